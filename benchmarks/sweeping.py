"""Times a sweep of several adapters: ``llamatune train`` for each, one after another in one process, and all at once.

    python benchmarks/sweeping.py --shape 50m --dtype bfloat16 --precision fp32 --tokens 64 [--members 4] [--updates 20]

The sides alternate, and each run begins in an empty directory. Times are of the commands, imports, loading and the page
included: by the clock, and the processor's in all processes of a command, which a busy machine changes less. Each
command is run for two numbers of updates; the difference is the time of an update of all adapters, from which starting
and loading are gone: the processor's is what the update costs, that of the clock also falls with the cores that a sweep
uses (``taskset`` limits them). Checkpoints, adapters and losses must be equal to the byte. The last line on stdout is a
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from material import DTYPES, SHAPES, make_base

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.shapes.llama_config import LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
BASE_OF_DEMO = ROOT / "llamatune" / "demo" / "base"
RATES = ("1e-4", "2e-4", "4e-4", "8e-4", "1.6e-3", "3.2e-3", "6.4e-3", "1.28e-2")
SIDES = ("train", "sweep --at-once 1", "sweep")
TENSORS = ("adapter/adapter_model.safetensors", "checkpoints/*/optimizer.safetensors")


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="50m", choices=[*SHAPES, "15m", "110m"])
    parser.add_argument("--dtype", default="bfloat16", help="model.dtype")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--tokens", type=int, default=64, help="of the average row")
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--least-updates", type=int, default=5, help="of the shorter run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", action="append", choices=SIDES)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sys.stdout.write(json.dumps(measure(asked, Path(scratch))) + "\n")


def measure(asked: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The facts of the comparison: medians, and medians of the ratios of paired rounds."""
    spec = write_material(asked, scratch)
    rates, sides = RATES[: asked.members], asked.side or SIDES
    times: dict[str, dict[str, list[float]]] = {
        name: {side: [] for side in sides}
        for name in ("whole_s", "whole_processor_s", "update_s", "update_processor_s")
    }
    for number in range(asked.rounds):
        products = []
        for side in sides:
            clock_of_few, few, _ = run_side(side, spec, rates, scratch / "out", asked.threads, asked.least_updates)
            clock, processor, runs = run_side(side, spec, rates, scratch / "out", asked.threads, asked.updates)
            more = asked.updates - asked.least_updates
            measured = (clock, processor, (clock - clock_of_few) / more, (processor - few) / more)
            for name, value in zip(times, measured, strict=True):
                times[name][side].append(value)
            products.append([content_of(run) for run in runs])
        if any(found != products[0] for found in products):
            raise SystemExit("the sides trained other weights")
        shown = {name: {side: round(found[-1], 2) for side, found in of.items()} for name, of in times.items()}
        sys.stderr.write(f"round {number + 1}: {shown}\n")
    facts = {key: value for key, value in vars(asked).items() if key != "side"}
    medians = {
        name: {side: round(statistics.median(found), 3) for side, found in of.items()} for name, of in times.items()
    }
    ratios = {
        name.replace("_s", "_ratio"): {side: ratio(of[side], of[sides[0]]) for side in sides[1:]}
        for name, of in times.items()
    }
    return {**facts, "cpu": torch.backends.cpu.get_cpu_capability(), **medians, **ratios}


def ratio(times: list[float], others: list[float]) -> float:
    """The median of the ratios of paired rounds."""
    return round(statistics.median(one / other for one, other in zip(times, others, strict=True)), 3)


def write_material(asked: argparse.Namespace, scratch: Path) -> Path:
    """A base, prepared rows and a run spec."""
    more = {"15m": LlamaConfig(288, 768, 6, 6, 6, 32000), "110m": LlamaConfig(768, 2048, 12, 12, 12, 32000)}
    config = {**SHAPES, **more}[asked.shape]
    held = next((dtype for name, dtype in DTYPES.values() if name == asked.dtype), torch.bfloat16)
    base = make_base(scratch / "base", config, held, BASE_OF_DEMO / "tokenizer.model")
    rows = scratch / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(400):
            words = max(2, (asked.tokens + number * 7 % (asked.tokens // 2) - asked.tokens // 4) // 3)
            text = " ".join(f"w{(number + place) % 9}" for place in range(words))
            file.write(json.dumps({"prompt": text[: len(text) // 3], "completion": text[len(text) // 3 :]}) + "\n")
    prepared = scratch / "prepared"
    prepare_data(PrepareOptions(rows=[rows], tokenizer=BASE_OF_DEMO, output=prepared))
    values = {
        "model": {"path": str(base), "dtype": asked.dtype},
        "lora": {"r": 16, "alpha": 32, "dropout": 0.05, "target_modules": "all-linear"},
        "data": {"train": str(prepared)},
        "training": {
            "output_dir": str(scratch / "unused"),
            "max_steps": asked.updates,
            "micro_batch_size": asked.micro_batch,
            "gradient_accumulation_steps": asked.accumulation,
            "precision": asked.precision,
            "device": "cpu",
        },
    }
    path = scratch / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_side(
    side: str, spec: Path, rates: tuple[str, ...], output: Path, threads: int, updates: int
) -> tuple[float, float, list[Path]]:
    """Train all adapters; the seconds that passed, those of the processor, and the run directories."""
    shutil.rmtree(output, ignore_errors=True)
    length, began, used = f"training.max_steps={updates}", time.perf_counter(), _processor_s()
    if side == "train":
        runs = [output / rate for rate in rates]
        for run, rate in zip(runs, rates, strict=True):
            rate_and_place = [f"training.learning_rate={rate}", f"training.output_dir={run}"]
            run_verb(["train", str(spec), length, *rate_and_place], threads)
    else:
        grid = f"training.learning_rate={','.join(rates)}"
        verb, *how = side.split()
        run_verb([verb, str(spec), length, *how, "--grid", grid, "--output", str(output)], threads)
        runs = [output / "runs" / f"learning_rate={rate}" for rate in rates]
    return time.perf_counter() - began, _processor_s() - used, runs


def run_verb(words: list[str], threads: int) -> None:
    """Run a verb in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llamatune", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]} ended with exit code {done.returncode}: {done.stderr.strip().splitlines()[-1]}")


def _processor_s() -> float:
    """Of the commands that have ended, and of the processes that these waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def content_of(run: Path) -> list[bytes]:
    """The trained weights, the optimizer's state, and the losses."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    return [json.dumps(losses).encode()] + [
        path.read_bytes() for pattern in TENSORS for path in sorted(run.glob(pattern))
    ]


if __name__ == "__main__":
    main()
