"""Shared by the comparisons: settings of peers, specs, scripts run as processes, timing and peak memory."""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from material import ALPHA, DTYPES, SHAPES, TARGETS, R, make_adapter, make_base, write_config

HERE = Path(__file__).parent
LEARNING_RATE = 2e-4
Result = TypeVar("Result")


class Setting(NamedTuple):
    """How a peer is run on windows of eight rows; ``sixteen_bit``: its adapter has the base's dtype, too."""

    peer: str
    micro_batch: int = 8
    accumulation: int = 1
    by_length: bool = False
    autocast: bool = False
    sixteen_bit: bool = False
    checkpointing: bool = False
    compile: bool = False
    padding_free: bool = False


SETTINGS = {
    "Trainer, batch 8": Setting("trainer"),  # its defaults
    "Trainer, batch 1 x 8": Setting("trainer", 1, 8),
    "Trainer, batch 8, autocast": Setting("trainer", autocast=True),
    "Trainer, batch 8, 16-bit adapters": Setting("trainer", sixteen_bit=True),
    "Trainer, batch 8 by length, 16-bit adapters": Setting("trainer", by_length=True, sixteen_bit=True),
    "Trainer, batch 32 by length, 16-bit adapters": Setting("trainer", 32, by_length=True, sixteen_bit=True),
    "SFTTrainer, defaults": Setting("sft", autocast=True, checkpointing=True),
    "SFTTrainer, batch 1 x 8": Setting("sft", 1, 8, sixteen_bit=True),
    "SFTTrainer, batch 8": Setting("sft", sixteen_bit=True),
    "SFTTrainer, batch 8 without padding": Setting("sft", sixteen_bit=True, padding_free=True),
    "torchtune, defaults": Setting("torchtune", 2, 4, sixteen_bit=True, checkpointing=True),
    "torchtune, best": Setting("torchtune", sixteen_bit=True, compile=True),
    "litgpt, defaults": Setting("litgpt", 1, 8, sixteen_bit=True),
    "litgpt, best": Setting("litgpt", sixteen_bit=True, compile=True),
}
"""Best: what was fastest on equal windows; compiled only on a GPU, where that pays within an epoch."""


def add_options(parser: argparse.ArgumentParser, output_required: bool = True) -> None:
    """The options of every script that builds a ``Bench``."""
    parser.add_argument("--tokenizer", type=Path, help="LLaMA-2's tokenizer.model")
    parser.add_argument("--output", type=Path, required=output_required, help="where table.md and table.json go")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="of the model; the default is 7b on a GPU")
    parser.add_argument("--dense-rounds", type=int, default=15)
    parser.add_argument("--spec", action="append", default=[], metavar="KEY=VALUE", help="for llamatune's run spec")


class Bench:
    """One comparison: its scratch directory, the inputs of all sides, and the processes that run them.

    ``drawn``: base directories hold no weights; each process draws them on its device (``drawn_base.py``).
    """

    drawn = False

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options, self.scratch, self.runs = options, scratch, 0
        self._bases: dict[str, Path] = {}
        self._adapters: dict[tuple[str, str], Path] = {}

    def base(self, shape: str) -> Path:
        """The model directory of a shape, made once."""
        if shape not in self._bases:
            path, dtype, options = self.scratch / f"base-{shape}", DTYPES[self.options.dtype][1], self.options
            if self.drawn:
                write_config(path, SHAPES[shape], dtype, options.tokenizer)
            else:
                make_base(path, SHAPES[shape], dtype, options.tokenizer, options.device)
            self._bases[shape] = path
        return self._bases[shape]

    def adapter(self, shape: str, targets: str) -> Path:
        """The adapter directory that all sides start from, made once."""
        key = (shape, targets)
        if key not in self._adapters:
            path = self.scratch / f"adapter-{shape}-{targets}"
            self._adapters[key] = make_adapter(path, SHAPES[shape], TARGETS[targets])
        return self._adapters[key]

    def tokens(self, row_tokens: int) -> int:
        """Of a row; an eighth on the tiny shape, which tries a script and measures nothing."""
        return row_tokens // 8 if self.options.shape == "tiny" else row_tokens

    def new_path(self, name: str) -> Path:
        """A new path in the scratch directory."""
        self.runs += 1
        return self.scratch / f"{self.runs:03d}-{name}"

    def spec(
        self,
        shape: str,
        targets: str,
        prepared: Path | None = None,
        micro_batch: int = 8,
        accumulation: int = 1,
        dtype: str | None = None,
        **training: Any,
    ) -> Any:
        """A llamatune run spec as plain values, with ``--spec`` applied last; ``dtype`` is ``model.dtype``."""
        values: dict[str, Any] = {
            "model": {"path": str(self.base(shape)), "dtype": dtype or DTYPES[self.options.dtype][0]},
            "lora": {"r": R, "alpha": ALPHA, "dropout": 0.0, "target_modules": list(TARGETS[targets]),
                     "init_from": str(self.adapter(shape, targets))},
            "data": {"train": str(prepared), "shuffle": False},
            "training": {"output_dir": str(self.new_path("run")), "micro_batch_size": micro_batch,
                         "gradient_accumulation_steps": accumulation, "learning_rate": LEARNING_RATE,
                         "precision": self.options.dtype, "device": self.options.device, **training},
        }  # fmt: skip
        for assignment in self.options.spec:
            name, _, text = assignment.partition("=")
            section, _, key = name.partition(".")
            values[section][key] = json.loads(text) if text[:1] in '0123456789tfn[{"' else text
        if self.drawn:
            values["model"]["init"] = "random"
        return values

    def peer(
        self, shape: str, targets: str, setting: Setting, prepared: Path | None = None, **more: Any
    ) -> dict[str, Any]:
        """The settings of a peer's side."""
        return {"base": str(self.base(shape)), "adapter": str(self.adapter(shape, targets)), "prepared": str(prepared),
                "output": str(self.new_path(setting.peer)), "dtype": self.options.dtype, "device": self.options.device,
                "learning_rate": LEARNING_RATE, **setting._asdict(),
                "autocast": setting.autocast and self.options.dtype == "bf16",
                "compile": setting.compile and self.options.device == "cuda", **more}  # fmt: skip

    def steps(
        self, ours: dict[str, Any], theirs: dict[str, Any] | None, shape: str, rows: int, tokens: int, **more: Any
    ) -> dict[str, Any]:
        """The report of steps.py on llamatune's specs by name, and on a peer."""
        settings = {"ours": ours, "theirs": theirs, "device": self.options.device, "rows": rows, "row_tokens": tokens,
                    "target_share": 0.46, "vocab_size": SHAPES[shape].vocab_size, "warm_up": 3,
                    "rounds": self.options.dense_rounds, **more}  # fmt: skip
        return self.report("steps.py", settings)

    def once(self, kind: str, settings: Any, seconds: float, work: Callable[[], Result]) -> Result:
        """What ``work`` returns; a bench that keeps its reports (``pieces.py``) does the same work once."""
        return work()

    def command(self, script: str, values: Any) -> list[str]:
        """A command that reads its settings from a file (JSON is YAML, too)."""
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


def difference(ours: list[float], theirs: list[float]) -> float:
    """The largest difference between two runs' losses of the same updates."""
    return max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=math.nan)


def timed(call: Callable[[], Result], cuda: bool) -> tuple[float, Result]:
    """Seconds of one call, including the device's work, and its result."""
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def peaks(cuda: bool) -> dict[str, int | None]:
    """Peak memory of this process: allocated and reserved on CUDA, resident on a CPU."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else resident,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }
