"""llamatune beside transformers' Trainer and PEFT: the same rows, weights, adapter and dtype, in turns, as ratios.

``python benchmarks/against_peft.py --rows alpaca.json --tokenizer tokenizer.model --output DIR`` runs one epoch end to
end; ``--dense`` whole steps on equal tokens without padding; ``--first-step`` the time from the command to the first
update. ``--cuda`` does the same on a GPU with LLaMA-2-7B's shape, and with ``--dense`` measures the memory of each
setting. A ratio above 1 says that llamatune needs less. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from material import ALPHA, DTYPES, SHAPES, TARGETS, R, make_adapter, make_base, make_prepared, read_rows
from tables import Table

HERE = Path(__file__).parent
LEARNING_RATE = 2e-4
TRAINER = {  # micro-batch, accumulation, rows of like length together, autocast
    "batch 8": (8, 1, False, False),
    "batch 1 x 8": (1, 8, False, False),
    "batch 8, by length": (8, 1, True, False),
    "batch 8, autocast": (8, 1, False, True),
    "batch 1 x 8, autocast": (1, 8, False, True),
}
DENSE_CPU = {  # shape, targets, rows, row tokens
    "q,v, small head": ("dense", "qv", 2, 256),
    "all seven, small head": ("dense", "all", 2, 256),
    "q,v, 32,000-word head": ("dense-32k", "qv", 2, 256),
}
DENSE_CUDA = {"7B, q,v, 8 x 512": ("7b", "qv", 8, 512), "7B, all seven, 8 x 512": ("7b", "all", 8, 512)}
MEMORY_CUDA = {  # targets, rows, row tokens, activation checkpointing
    "1 x 512, q,v, no recompute": ("qv", 1, 512, "none"),
    "8 x 512, all seven, no recompute": ("all", 8, 512, "none"),
    "8 x 512, q,v, full recompute": ("qv", 8, 512, "block"),
    "8 x 2048, q,v, full recompute": ("qv", 8, 2048, "block"),
}


class Bench:
    """One comparison: its scratch directory, what both sides read, and how processes are run."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch, self.runs = options, scratch, 0
        self.device = "cuda" if options.cuda else "cpu"
        self._bases: dict[str, Path] = {}
        self._adapters: dict[tuple[str, str], Path] = {}

    def base(self, shape: str) -> Path:
        """A model directory of a shape, made once."""
        if shape not in self._bases:
            path, dtype = self.scratch / f"base-{shape}", DTYPES[self.options.dtype][1]
            self._bases[shape] = make_base(path, SHAPES[shape], dtype, self.options.tokenizer, self.device)
        return self._bases[shape]

    def adapter(self, shape: str, targets: str) -> Path:
        """An adapter directory to start from, made once."""
        key = (shape, targets)
        if key not in self._adapters:
            path = self.scratch / f"adapter-{shape}-{targets}"
            self._adapters[key] = make_adapter(path, SHAPES[shape], TARGETS[targets])
        return self._adapters[key]

    def new_path(self, name: str) -> Path:
        """A name that no run has used."""
        self.runs += 1
        return self.scratch / f"{self.runs:03d}-{name}"

    def spec(
        self, shape: str, targets: str, prepared: Path, micro_batch: int, accumulation: int, **training: Any
    ) -> Any:
        """A llamatune run spec as plain values, ``--spec`` put in last."""
        values: dict[str, Any] = {
            "model": {"path": str(self.base(shape)), "dtype": DTYPES[self.options.dtype][0]},
            "lora": {"r": R, "alpha": ALPHA, "dropout": 0.0, "target_modules": list(TARGETS[targets]),
                     "init_from": str(self.adapter(shape, targets))},
            "data": {"train": str(prepared), "shuffle": False},
            "training": {"output_dir": str(self.new_path("run")), "micro_batch_size": micro_batch,
                         "gradient_accumulation_steps": accumulation, "learning_rate": LEARNING_RATE,
                         "precision": self.options.dtype, "device": self.device, **training},
        }  # fmt: skip
        for assignment in self.options.spec:
            name, _, text = assignment.partition("=")
            section, _, key = name.partition(".")
            values[section][key] = json.loads(text) if text[:1] in '0123456789tfn[{"' else text
        return values

    def peer(self, shape: str, targets: str, setting: str, prepared: Path | None, **more: Any) -> dict[str, Any]:
        """Settings of the Trainer side."""
        micro_batch, accumulation, by_length, autocast = TRAINER[setting]
        return {"base": str(self.base(shape)), "adapter": str(self.adapter(shape, targets)), "prepared": str(prepared),
                "output": str(self.new_path("trainer")), "dtype": self.options.dtype, "device": self.device,
                "micro_batch_size": micro_batch, "accumulation": accumulation, "by_length": by_length,
                "autocast": autocast and self.options.dtype == "bf16", "checkpointing": False,
                "num_epochs": self.options.epochs, "learning_rate": LEARNING_RATE, **more}  # fmt: skip

    def command(self, script: str, values: Any) -> list[str]:
        """A command whose settings lie in a file (JSON is YAML too)."""
        path = self.new_path("settings.json")
        path.write_text(json.dumps(values))
        if script == "llamatune":
            return [sys.executable, "-m", "llamatune", "train", str(path)]
        return [sys.executable, str(HERE / script), str(path)]

    def report(self, script: str, values: Any) -> dict[str, Any]:
        """Run a script and read the JSON object on its last line; ``wall_s`` is the whole process."""
        started = time.monotonic()
        done = subprocess.run(self.command(script, values), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{done.stderr[-3000:]}")
        return {**json.loads(done.stdout.splitlines()[-1]), "wall_s": time.monotonic() - started}


def end_to_end(bench: Bench, table: Table) -> None:
    """Epochs over the rows, each run in a process of its own; seconds are from the first window to the last update."""
    options, shape = bench.options, bench.options.shape
    prepared = make_prepared(bench.scratch / "prepared", options.rows, options.tokenizer, options.limit)
    rows = read_rows(prepared)
    tokens = options.epochs * sum(len(row.input_ids) for row in rows)
    table.note(f"{shape} shape, {len(rows)} rows, {tokens} tokens without padding, {options.epochs} epoch(s), "
               f"{options.dtype}, r {R} on {', '.join(TARGETS[options.targets])}")  # fmt: skip
    settings = [name for name in TRAINER if options.peers == "all" or name in options.peers.split(";")]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ["llamatune", *settings]}
    for number in range(options.rounds):
        for name in list(results)[:: 1 if number % 2 == 0 else -1]:
            if name == "llamatune":
                spec = bench.spec(shape, options.targets, prepared, *options.ours, num_epochs=options.epochs)
                found = bench.report("side_llamatune.py", spec)
            else:
                found = bench.report("side_trainer.py", bench.peer(shape, options.targets, name, prepared))
            results[name].append(found)
            table.progress(f"round {number + 1}: {name}: {found['loop_s']:.1f} s, loss {found['losses'][-1]:.4f}")
    ours = results["llamatune"]
    for name in settings:
        assert ours[0]["trainable_parameters"] == results[name][0]["trainable_parameters"], "not the same model"
        ratios = [b["loop_s"] / a["loop_s"] for a, b in zip(ours, results[name], strict=True)]
        speeds = [tokens / statistics.median(run["loop_s"] for run in side) for side in (ours, results[name])]
        apart = difference(ours[0]["losses"], results[name][0]["losses"]) if "length" not in name else None
        table.row(f"epoch, tokens/s, Trainer {name}", *speeds, ratios, apart)
        walls = [statistics.median(run["wall_s"] for run in side) for side in (ours, results[name])]
        table.row(f"whole process, s, Trainer {name}", *walls, [walls[1] / walls[0]], None)
        memory = [max(run["peak_memory_bytes"] for run in side) / 2**30 for side in (ours, results[name])]
        table.row(f"peak memory, GiB, Trainer {name}", *memory, [memory[1] / memory[0]], None)


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest difference between two runs' losses of the same updates."""
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=math.nan)


def dense_settings(bench: Bench, shape: str, targets: str, rows: int, tokens: int, **more: Any) -> dict[str, Any]:
    """Settings of dense_steps.py."""
    mode = more.pop("mode", "none")
    spec = bench.spec(shape, targets, Path("none"), rows, 1, activation_checkpointing=mode)
    peer = bench.peer(shape, targets, "batch 8", None, autocast=bench.options.autocast, checkpointing=mode != "none")
    return {**peer, "spec": spec, "rows": rows, "row_tokens": tokens, "target_share": 0.46, "warm_up": 3,
            "vocab_size": SHAPES[shape].vocab_size, "rounds": bench.options.dense_rounds,
            "sides": ["llamatune", "peft"], **more}  # fmt: skip


def dense(bench: Bench, table: Table) -> None:
    """Paired rounds of whole steps in one process."""
    for name, (shape, targets, rows, tokens) in (DENSE_CUDA if bench.options.cuda else DENSE_CPU).items():
        found = bench.report("dense_steps.py", dense_settings(bench, shape, targets, rows, tokens))
        counts = found["trainable_parameters"]
        assert counts["llamatune"] == counts["peft"], "not the same model"
        speeds = [rows * tokens / found["step_s"][side] for side in ("llamatune", "peft")]
        apart = difference(found["losses"]["llamatune"], found["losses"]["peft"])
        table.row(f"dense, tokens/s, {name}, {bench.options.dtype}", *speeds, found["ratios"], apart)


def memory(bench: Bench, table: Table) -> None:
    """Peak memory of each setting of the 7B shape, each side alone in a process."""
    for name, (targets, rows, tokens, mode) in MEMORY_CUDA.items():
        found = []
        for side in ("llamatune", "peft"):
            settings = dense_settings(bench, "7b", targets, rows, tokens, mode=mode, sides=[side], rounds=3)
            found.append(bench.report("dense_steps.py", settings))
        for kind in ("memory", "reserved"):
            sizes = [run[f"peak_{kind}_bytes"] / 2**30 for run in found]
            table.row(f"peak {kind}, GiB, {name}", *sizes, [sizes[1] / sizes[0]], None)


def first_step(bench: Bench, table: Table) -> None:
    """Seconds from the command to the line that reports the first update."""
    options = bench.options
    prepared = make_prepared(bench.scratch / "prepared-tiny", options.rows, options.tokenizer, 8)
    seconds: dict[str, list[float]] = {"llamatune": [], "side_trainer.py": []}
    for _ in range(options.first_step_rounds):
        for name, found in seconds.items():
            if name == "llamatune":
                values = bench.spec("tiny", "qv", prepared, 8, 1, max_steps=1)
            else:
                values = bench.peer("tiny", "qv", "batch 8", prepared, max_steps=1)
            found.append(seconds_to_first_step(bench.command(name, values)))
    ours, theirs = seconds.values()
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    table.row("command to first update, s", statistics.median(ours), statistics.median(theirs), ratios, None)


def seconds_to_first_step(command: list[str]) -> float:
    """Watch a command's stderr for its first ``step=1``."""
    started, heard = time.monotonic(), []
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    took = None
    for line in child.stderr:
        heard.append(line)
        if took is None and (" step=1/" in line or line.startswith("step=1")):
            took = time.monotonic() - started
    if child.wait() or took is None:
        raise SystemExit(f"{command}:\n{''.join(heard)[-3000:]}")
    return took


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="Alpaca rows, JSON")
    parser.add_argument("--tokenizer", type=Path, required=True, help="LLaMA-2's tokenizer.model")
    parser.add_argument("--output", type=Path, required=True, help="where table.md and table.json go")
    parser.add_argument("--limit", type=int, help="only so many rows")
    parser.add_argument("--rounds", type=int, default=3, help="end-to-end rounds")
    parser.add_argument("--dense-rounds", type=int, default=15)
    parser.add_argument("--first-step-rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shape", choices=SHAPES, help="end to end: 50m, with --cuda 7b")
    parser.add_argument("--targets", choices=TARGETS, default="qv")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--peers", default="all", help=f"of {'; '.join(TRAINER)}, joined by ';'")
    parser.add_argument("--ours", type=int, nargs=2, default=(8, 1), metavar=("MICRO_BATCH", "ACCUMULATION"))
    parser.add_argument("--spec", action="append", default=[], metavar="KEY=VALUE", help="for llamatune's run spec")
    parser.add_argument("--autocast", action="store_true", help="dense: the peer under bf16 autocast")
    for name in ("end-to-end", "dense", "first-step", "cuda"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    options.shape = options.shape or ("7b" if options.cuda else "50m")
    options.end_to_end = options.end_to_end or not (options.dense or options.first_step)
    return options


def main() -> None:
    """Run what was asked for and write the table."""
    options = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"
    table = Table(options.output, " ".join(sys.argv))
    for peer in ("torchtune", "litgpt", "unsloth"):
        if importlib.util.find_spec(peer) is None:
            table.note(f"{peer}: not importable, no column")
        else:
            table.note(f"{peer} {importlib.metadata.version(peer)}: importable, but no column is written for it yet")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        if options.first_step:
            first_step(bench, table)
        if options.dense:
            dense(bench, table)
            if options.cuda:
                memory(bench, table)
        if options.end_to_end:
            end_to_end(bench, table)


if __name__ == "__main__":
    main()
