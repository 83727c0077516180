"""Compares llamatune with other projects on the same rows, weights, adapter and dtype, alternating; reports ratios.

``python benchmarks/against_peft.py --rows alpaca.json --tokenizer tokenizer.model --output DIR`` runs one epoch end to
end; ``--dense`` whole steps on equal tokens without padding; ``--first-step`` measures the time from the command to the
first update. The peer is transformers' Trainer with PEFT; ``--peers trainer,sft,torchtune,litgpt`` runs those that
are installed. A ratio above 1 means that llamatune needs less. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import SETTINGS, Bench, Setting, add_options, difference
from material import TARGETS, R, make_prepared, read_rows
from tables import Table
from training_peers import version

DENSE = {  # targets, rows, row tokens
    "q,v": ("qv", 8, 512),
    "all seven": ("all", 8, 512),
}
DENSE_SMALL = {  # shape, targets, rows, row tokens
    "q,v, small head": ("dense", "qv", 2, 256),
    "all seven, small head": ("dense", "all", 2, 256),
    "q,v, 32,000-word head": ("dense-32k", "qv", 2, 256),
}


def chosen(options: argparse.Namespace, table: Table) -> dict[str, Setting]:
    """The settings of the chosen peers that are installed; notes versions, and which are not installed."""
    names = options.settings.split(";") if options.settings else list(SETTINGS)
    settings = {}
    for peer in options.peers.split(","):
        if version(peer) is None:
            table.note(f"{peer}: not installed")
            continue
        table.note(f"{peer}: {version(peer)}")
        settings |= {name: setting for name, setting in SETTINGS.items() if setting.peer == peer and name in names}
    return settings


def end_to_end(bench: Bench, table: Table) -> None:
    """Epochs over the rows, each run in a process of its own; seconds are from the first window to the last update."""
    options, shape = bench.options, bench.options.shape
    prepared = make_prepared(bench.scratch / "prepared", options.rows, options.tokenizer, options.limit)
    rows = read_rows(prepared)
    tokens = options.epochs * sum(len(row.input_ids) for row in rows)
    table.note(f"{shape} shape, {len(rows)} rows, {tokens} tokens without padding, {options.epochs} epoch(s), "
               f"{options.dtype}, r {R} on {', '.join(TARGETS[options.targets])}")  # fmt: skip
    settings = chosen(options, table)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ["llamatune", *settings]}
    for number in range(options.rounds):
        for name in list(results)[:: 1 if number % 2 == 0 else -1]:
            if name == "llamatune":
                spec = bench.spec(shape, options.targets, prepared, *options.ours, num_epochs=options.epochs)
                packed = spec["data"].get("packing", False)
                report = bench.report("side_llamatune.py", spec)
            else:
                setting = settings[name]
                script = {"trainer": "side_trainer.py", "sft": "side_sft.py"}.get(setting.peer, "side_peer.py")
                more = {"num_epochs": options.epochs}
                report = bench.report(script, bench.peer(shape, options.targets, setting, prepared, **more))
            results[name].append(report)
            table.progress(f"round {number + 1}: {name}: {report['loop_s']:.1f} s, loss {report['losses'][-1]:.4f}")
    ours = results["llamatune"]
    for name, setting in settings.items():
        assert ours[0]["trainable_parameters"] == results[name][0]["trainable_parameters"], "not the same model"
        ratios = [b["loop_s"] / a["loop_s"] for a, b in zip(ours, results[name], strict=True)]
        speeds = [tokens / statistics.median(run["loop_s"] for run in side) for side in (ours, results[name])]
        # Losses are compared if both sides see the same rows in the same windows.
        same_windows = not packed and not setting.by_length
        apart = difference(ours[0]["losses"], results[name][0]["losses"]) if same_windows else None
        table.row(f"epoch, tokens/s, {name}", *speeds, ratios, apart)
        walls = [statistics.median(run["wall_s"] for run in side) for side in (ours, results[name])]
        table.row(f"whole process, s, {name}", *walls, [walls[1] / walls[0]], None)
        for kind in ("memory", "reserved"):
            if ours[0][f"peak_{kind}_bytes"] is not None:
                sizes = [max(run[f"peak_{kind}_bytes"] for run in side) / 2**30 for side in (ours, results[name])]
                table.row(f"peak {kind}, GiB, {name}", *sizes, [sizes[1] / sizes[0]], None)


def dense(bench: Bench, table: Table) -> None:
    """Whole steps in paired rounds in one process."""
    options = bench.options
    shapes = DENSE_SMALL if options.shape == "50m" else {name: (options.shape, *rest) for name, rest in DENSE.items()}
    for peer_name, peer in chosen(options, table).items():
        if peer.by_length or peer.accumulation > 1 or peer.peer == "sft":
            continue  # equal rows in one batch; SFTTrainer has no step outside its own loop
        for name, (shape, targets, rows, tokens) in shapes.items():
            dense_rows(bench, table, f"{name}, {peer_name}", peer, shape, targets, rows, tokens)


def dense_rows(
    bench: Bench, table: Table, name: str, peer: Setting, shape: str, targets: str, rows: int, tokens: int, **more: Any
) -> None:
    """One comparison on equal rows; with ``alone`` the peaks of each side alone, too."""
    sides = {"llamatune": bench.spec(shape, targets, micro_batch=rows)}, bench.peer(shape, targets, peer)
    report = bench.steps(*sides, shape, rows, tokens, **more)
    counts, step_s, losses = (report[key] for key in ("trainable_parameters", "step_s", "losses"))
    assert counts["llamatune"] == counts[peer.peer], "not the same model"
    speeds = [rows * tokens / step_s[side] for side in ("llamatune", peer.peer)]
    apart = difference(losses["llamatune"], losses[peer.peer])
    table.row(f"dense, tokens/s, {name}", *speeds, report["ratios"], apart)
    for kind in ("memory", "reserved") if report["alone"] else ():
        sizes = [report["alone"][side][f"peak_{kind}_bytes"] / 2**30 for side in ("llamatune", peer.peer)]
        table.row(f"peak {kind}, GiB, {name}", *sizes, [sizes[1] / sizes[0]], None)


def first_step(bench: Bench, table: Table) -> None:
    """Wall and processor seconds from the command to the line that reports the first update."""
    options = bench.options
    prepared = make_prepared(bench.scratch / "prepared-tiny", options.rows, options.tokenizer, 8)
    seconds: dict[str, list[tuple[float, float]]] = {"llamatune": [], "side_trainer.py": []}
    for _ in range(options.first_step_rounds):
        for name, runs in seconds.items():
            if name == "llamatune":
                values = bench.spec("tiny", "qv", prepared, 8, 1, max_steps=1)
            else:
                values = bench.peer("tiny", "qv", Setting("trainer"), prepared, num_epochs=1, max_steps=1)
            runs.append(seconds_to_first_step(bench.command(name, values)))
    for index, kind in enumerate(("s", "processor s")):
        ours, theirs = ([run[index] for run in side] for side in seconds.values())
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        table.row(f"command to first update, {kind}", statistics.median(ours), statistics.median(theirs), ratios, None)


def seconds_to_first_step(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds until a command first writes ``step=1`` to stderr (Linux)."""
    started, lines = time.monotonic(), []
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    took = None
    for line in child.stderr:
        lines.append(line)
        if took is None and (" step=1/" in line or line.startswith("step=1")):
            ticks = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            took = time.monotonic() - started, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    if child.wait() or took is None:
        raise SystemExit(f"{command}:\n{''.join(lines)[-3000:]}")
    return took


def build_parser(required: bool = True) -> argparse.ArgumentParser:
    """The command line's options; without ``required`` rows and output may be left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=required, help="Alpaca rows, JSON")
    add_options(parser, output_required=required)
    parser.add_argument("--limit", type=int, help="only so many rows")
    parser.add_argument("--rounds", type=int, default=3, help="end-to-end rounds")
    parser.add_argument("--first-step-rounds", type=int, default=5)
    parser.add_argument("--targets", choices=TARGETS, default="qv")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--peers", default="trainer", help="of trainer,sft,torchtune,litgpt")
    parser.add_argument("--settings", help=f"of {'; '.join(SETTINGS)}, joined by ';'; all of the peers' by default")
    parser.add_argument("--ours", type=int, nargs=2, default=(8, 1), metavar=("MICRO_BATCH", "ACCUMULATION"))
    for name in ("end-to-end", "dense", "first-step"):
        parser.add_argument(f"--{name}", action="store_true")
    return parser


def main() -> None:
    """Run the chosen comparisons and write the table."""
    options = build_parser().parse_args()
    options.shape = options.shape or ("7b" if options.device == "cuda" else "50m")
    os.environ["HF_HUB_OFFLINE"] = "1"
    table = Table(options.output, " ".join(sys.argv))
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        if options.first_step:
            first_step(bench, table)
        if options.dense:
            dense(bench, table)
        if options.end_to_end or not (options.dense or options.first_step):
            end_to_end(bench, table)


if __name__ == "__main__":
    main()
