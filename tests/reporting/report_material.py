"""Run directories with known curves, written line by line as training writes them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamatune.events import EvalDone, Step
from llamatune.spec import build_spec

MEMORY_BYTES = 3 << 30


def make_steps(losses: Sequence[float], epochs: int = 4) -> list[Step]:
    """A step for each loss; the gradient's norm is ten times the loss, the rate falls linearly.

    Memory and loss scale change after the second step, so that they are worth a chart.
    """
    count = len(losses)
    return [
        Step(
            step=number, window=number, epoch=number / count * epochs, loss=loss,
            learning_rate=1e-3 * (1 - number / (count + 1)), grad_norm=10 * loss, target_tokens=100,
            loss_scale=2.0 if number < 3 else 1.0,
            tokens_per_second=1000.0 + number % 7, peak_memory_bytes=MEMORY_BYTES // (2 if number < 3 else 1),
            elapsed_s=0.5 * number,
        )
        for number, loss in enumerate(losses, 1)
    ]  # fmt: skip


def noisy(curve: Sequence[float], deviation: float, seed: int = 0) -> list[float]:
    """``curve`` with multiplicative noise, as losses of small batches have it."""
    chance = random.Random(seed)
    return [value * math.exp(chance.gauss(0, deviation)) for value in curve]


def falling(count: int, last: float = 1.0) -> list[float]:
    """An exponential fall from three times ``last`` that has mostly happened after a fifth of the steps."""
    return [last * (1 + 2 * math.exp(-8 * place / count)) for place in range(count)]


def spec_values(**changes: Any) -> dict[str, Any]:
    """A spec's values; ``changes`` are ``section__key=value``."""
    values: dict[str, Any] = {
        "model": {"path": "models/none", "dtype": "float32"},
        "lora": {},
        "data": {"train": "prepared/none"},
        "training": {"output_dir": "runs/none", "precision": "fp32"},
        "evaluation": {},
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values[section][key] = value
    return values


def summary_of(losses: Sequence[float]) -> dict[str, Any]:
    """What every version wrote into ``summary.json``."""
    last = make_steps(losses)[-1]
    return {
        "steps": last.step, "train_loss": last.loss, "best_eval_loss": None, "trainable_parameters": 12,
        "total_parameters": 120, "peak_memory_bytes": MEMORY_BYTES, "runtime_s": last.elapsed_s,
        "tokens_per_second": 1000.0,
    }  # fmt: skip


def write_run(
    path: Path,
    losses: Sequence[float],
    evaluations: Sequence[EvalDone] = (),
    extra: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
    summary: Mapping[str, Any] | None = None,
    tail: str = "",
    **spec: Any,
) -> Path:
    """A run directory; ``extra`` holds more lines by the step that they come after, ``tail`` ends the log."""
    path.mkdir(parents=True)
    (path / "spec.yaml").write_text(build_spec(spec_values(**spec), "test", stored=True).to_yaml(), encoding="utf-8")
    held_out = {found.step: found.loss for found in evaluations}
    with (path / "metrics.jsonl").open("w", encoding="utf-8") as log:
        for step in make_steps(losses):
            print(json.dumps({"event": "step", **vars(step)}), file=log)
            for line in (extra or {}).get(step.step, ()):
                print(json.dumps(line), file=log)
            if step.step in held_out:
                print(json.dumps({"event": "eval", "step": step.step, "loss": held_out[step.step]}), file=log)
        log.write(tail)
    if summary is not None:
        (path / "summary.json").write_text(json.dumps({**summary_of(losses), **summary}), encoding="utf-8")
    return path
