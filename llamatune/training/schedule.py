"""The schedule of a run: windows per epoch, total steps, warm-up, learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llamatune.data.batches import Split, packing_budget
from llamatune.data.packing import pack
from llamatune.errors import SpecError
from llamatune.spec import RunSpec, TrainingSection


@dataclass(frozen=True)
class Schedule:
    """How many accumulation windows an epoch has, and where the run ends.

    A row is one sample, or several packed ones.
    """

    rows: int
    rows_per_window: int
    windows_per_epoch: int
    num_epochs: int
    total_steps: int


def plan_schedule(spec: RunSpec, train: Split) -> Schedule:
    """Count windows and steps; the last window of an epoch may be partial."""
    training, budget = spec.training, packing_budget(spec)
    rows = len(train) if budget is None else len(pack(train.lengths, budget, range(len(train))))
    rows_per_window = training.micro_batch_size * training.gradient_accumulation_steps
    windows_per_epoch = -(-rows // rows_per_window)
    if training.max_steps is not None:
        epochs, steps = -(-training.max_steps // windows_per_epoch), training.max_steps
    else:
        epochs = training.num_epochs or 5
        steps = epochs * windows_per_epoch
    warmup_steps(training, steps)  # raises if the warm-up is longer than the run
    return Schedule(rows, rows_per_window, windows_per_epoch, epochs, steps)


def micro_batch_tokens(spec: RunSpec, train: Split) -> float:
    """Tokens of the average micro-batch; a packed row counts as full."""
    tokens = sum(train.lengths)
    row_tokens = packing_budget(spec) or tokens / len(train)
    return min(tokens, spec.training.micro_batch_size * row_tokens)


def warmup_steps(spec: TrainingSection, total_steps: int) -> int:
    """Updates of linear warm-up; ``SpecError`` if longer than the run: the full rate would never be reached."""
    steps = spec.warmup_steps if spec.warmup_ratio is None else math.ceil(spec.warmup_ratio * total_steps)
    if steps > total_steps:
        raise SpecError(
            f"warm-up of {steps} steps is longer than the run of {total_steps}",
            "training.warmup_steps",
            "lower it, or set training.warmup_ratio",
        )
    return steps


def learning_rate_at(spec: TrainingSection, step: int, total_steps: int) -> float:
    """The rate of the update that follows ``step`` updates.

    Warm-up reaches the full rate at its last update. Then ``constant`` holds it; ``linear`` and ``cosine`` fall to
    ``min_learning_rate`` over what is left (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    warmup = warmup_steps(spec, total_steps)
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    if spec.lr_scheduler == "constant":
        return spec.learning_rate
    share = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = 1 - share if spec.lr_scheduler == "linear" else (1 + math.cos(math.pi * share)) / 2
    return spec.min_learning_rate + (spec.learning_rate - spec.min_learning_rate) * left
