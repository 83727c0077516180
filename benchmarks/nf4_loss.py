"""The loss with an NF4 base: LoRA on pretrained models in fp32, bf16 and NF4, on the same rows, with several seeds.

``python benchmarks/nf4_loss.py [--seeds 5] [--model NAME=DIR:ROWS ...]`` fine-tunes the demo's base (1.07 million
parameters) with the demo's spec, and every named model on rows of which a tenth is held out. It prints the loss of the
last epoch and of the held-out rows after it, each as mean and range over the seeds, and the difference of NF4 and bf16
with the same seed. fp32 computes in fp32, the two others in bf16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.demo.run_demo import MATERIAL, demo_spec
from llamatune.events import EpochDone, EvalDone, Event
from llamatune.spec import build_spec
from llamatune.training.train import train

BASES = {"float32": "fp32", "bfloat16": "bf16", "nf4": "bf16"}
"""``model.dtype`` and the ``training.precision`` that goes with it."""


def losses(values: dict[str, Any], output: Path, dtype: str, seed: int) -> tuple[float, float]:
    """Mean training loss of the last epoch, and the held-out loss after it."""
    training = {**values["training"], "output_dir": str(output), "seed": seed, "precision": BASES[dtype]}
    means = {}

    def on_event(event: Event) -> None:
        if isinstance(event, EpochDone):
            means["train"] = event.train_loss
        if isinstance(event, EvalDone):
            means["held out"] = event.loss

    spec = build_spec({**values, "model": {**values["model"], "dtype": dtype}, "training": training}, "benchmark")
    train(spec, on_event=on_event)
    sys.stderr.write(f"{output.name}: {means}\n")
    return means["train"], means["held out"]


def mean_and_range(numbers: list[float]) -> str:
    """``mean (lowest-highest)``"""
    return f"{statistics.mean(numbers):.4f} ({min(numbers):.4f}-{max(numbers):.4f})"


def compare(name: str, values: dict[str, Any], seeds: int, scratch: Path) -> None:
    """Print three lines of the table, and the paired differences."""
    by_dtype = {
        dtype: [losses(values, scratch / f"{name}-{dtype}-{seed}", dtype, seed) for seed in range(seeds)]
        for dtype in BASES
    }
    for dtype, pairs in by_dtype.items():
        training, held_out = ([*column] for column in zip(*pairs, strict=True))
        sys.stdout.write(f"| {name}, {dtype} | {mean_and_range(training)} | {mean_and_range(held_out)} |\n")
    apart = [
        [mine - theirs for mine, theirs in zip(nf4, bf16, strict=True)]
        for nf4, bf16 in zip(by_dtype["nf4"], by_dtype["bfloat16"], strict=True)
    ]
    cells = [
        f"{statistics.mean(column):+.4f} ({min(column):+.4f} to {max(column):+.4f})"
        for column in zip(*apart, strict=True)
    ]
    sys.stdout.write(f"| {name}, nf4 - bfloat16, same seed | {' | '.join(cells)} |\n")
    sys.stdout.flush()


def main() -> None:
    """Prepare, train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
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
            compare(name, own, options.seeds, scratch)


if __name__ == "__main__":
    main()
