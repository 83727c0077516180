"""The loss with a quantised base: LoRA on pretrained models in fp32, bf16, NF4 and float8, on the same rows.

``python benchmarks/quantized_loss.py [--seeds 5] [--model NAME=DIR:ROWS ...]`` fine-tunes the demo's base (1.07 million
parameters) with the demo's spec, and every named model on rows of which a tenth is held out. It prints the loss of the
last epoch and of the held-out rows after it, each as mean and range over the seeds, and the difference to bf16 with the
same seed. fp32 computes in fp32, the others in bf16. ``float8 products`` is float8 as a GPU of compute capability 8.9
or later computes it, with x and gradients in float8 too, here by the CPU's ``torch._scaled_mm``; a matrix with a
dimension that is no multiple of 16 is unpacked for its products.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.demo.run_demo import MATERIAL, demo_spec
from llamatune.events import EpochDone, EvalDone, Event
from llamatune.model import float8
from llamatune.spec import build_spec
from llamatune.training.train import train

BASES = {"float32": "fp32", "bfloat16": "bf16", "nf4": "bf16", "float8": "bf16", "float8 products": "bf16"}
"""``model.dtype`` and the ``training.precision`` that goes with it."""
QUANTIZED = ("nf4", "float8", "float8 products")


def losses(values: dict[str, Any], output: Path, base: str, seed: int) -> tuple[float, float]:
    """Mean training loss of the last epoch, and the held-out loss after it."""
    training = {**values["training"], "output_dir": str(output), "seed": seed, "precision": BASES[base]}
    dtype, _, as_on_gpu = base.partition(" ")
    means = {}

    def on_event(event: Event) -> None:
        if isinstance(event, EpochDone):
            means["train"] = event.train_loss
        if isinstance(event, EvalDone):
            means["held out"] = event.loss

    spec = build_spec({**values, "model": {**values["model"], "dtype": dtype}, "training": training}, "benchmark")
    with mock.patch.object(float8, "capability_of", return_value=(9, 0) if as_on_gpu else None):
        train(spec, on_event=on_event)
    sys.stderr.write(f"{output.name}: {means}\n")
    return means["train"], means["held out"]


def mean_and_range(numbers: list[float]) -> str:
    """``mean (lowest-highest)``"""
    return f"{statistics.mean(numbers):.4f} ({min(numbers):.4f}-{max(numbers):.4f})"


def compare(name: str, values: dict[str, Any], seeds: int, bases: list[str], scratch: Path) -> None:
    """Print the lines of the table, and the paired differences."""
    by_base = {
        base: [losses(values, scratch / f"{name}-{base}-{seed}", base, seed) for seed in range(seeds)] for base in bases
    }
    for base, pairs in by_base.items():
        training, held_out = ([*column] for column in zip(*pairs, strict=True))
        sys.stdout.write(f"| {name}, {base} | {mean_and_range(training)} | {mean_and_range(held_out)} |\n")
    for base in (base for base in QUANTIZED if {base, "bfloat16"} <= set(bases)):
        apart = [
            [mine - theirs for mine, theirs in zip(*pair, strict=True)]
            for pair in zip(by_base[base], by_base["bfloat16"], strict=True)
        ]
        cells = [
            f"{statistics.mean(column):+.4f} ({min(column):+.4f} to {max(column):+.4f})"
            for column in zip(*apart, strict=True)
        ]
        sys.stdout.write(f"| {name}, {base} - bfloat16, same seed | {' | '.join(cells)} |\n")
    sys.stdout.flush()


def main() -> None:
    """Prepare, train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bases", default=",".join(BASES), help="some of these, to compare")
    parser.add_argument("--limit", type=int, help="only so many rows")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=DIR:ROWS", help="another model and its rows"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # more threads do not help such small models
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        values = demo_spec(scratch).model_dump(mode="json")
        demo: dict[str, Any] = {"rows": [MATERIAL / "instructions.jsonl"], "validation": [MATERIAL / "held_out.jsonl"]}
        jobs = [("demo base", MATERIAL / "base", demo)]
        for text in options.model:
            name, _, rest = text.partition("=")
            base, _, rows = rest.partition(":")
            jobs.append((name, Path(base), {"rows": [Path(rows)], "validation_fraction": 0.1}))
        sys.stdout.write("| | training loss of the last epoch | held-out loss |\n|---|---|---|\n")
        for name, base, rows in jobs:
            prepared = scratch / name / "prepared"
            prepare_data(
                PrepareOptions(tokenizer=base / "tokenizer.model", output=prepared, limit=options.limit, **rows)
            )
            own = {**values, "model": {"path": str(base)}, "data": {"train": str(prepared)}}
            compare(name, own, options.seeds, options.bases.split(","), scratch)


if __name__ == "__main__":
    main()
