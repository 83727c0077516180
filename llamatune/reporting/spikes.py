"""Spikes of the training loss: where they are, and which rows were trained on there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from llamatune.errors import LlamatuneError
from llamatune.events import Step
from llamatune.reporting.averages import epoch_of
from llamatune.reporting.run_reader import Run

# A loss is compared with the median of the ten steps before it. It is a spike if it is higher by this many robust
# deviations more than recent losses were. The comparison is by ratio, because the noise of batches is multiplicative
# and skewed; five deviations of its logarithm occur by chance in one of ten thousand steps.
SPIKE_DEVIATIONS, SPIKE_LEVEL = 5.0, 10
# Enough jumps for a steady deviation, few enough that training has not changed much meanwhile.
SPIKE_WINDOW, SPIKE_FEWEST = 50, 10
# The least deviation, for curves without noise: a rise of less than a tenth is never a spike.
SPIKE_LEAST_DEVIATION = 0.02

_DEVIATIONS_PER_MAD = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""
_DECIDE_THE_ORDER = ("data.", "training.seed", "training.micro_batch_size", "training.gradient_accumulation_steps")


@dataclass(frozen=True)
class Cause:
    """``kind`` is ``learning rate``, ``rows`` or ``overflow``; ``evidence`` are clauses about this run's log."""

    kind: str
    evidence: list[str]


@dataclass(frozen=True)
class Spike:
    """A stretch of losses far above those before it, and its peak.

    ``typical_loss`` and ``typical_grad_norm`` are medians of the ten steps before. ``rows`` are the row numbers, in the
    input files, of the peak's window; None if they are not known. ``recovered``: the loss fell below the threshold
    again. ``cause`` is the likely one.
    """

    step: int
    first_step: int
    last_step: int
    window: int
    epoch: int
    loss: float
    typical_loss: float
    grad_norm: float
    typical_grad_norm: float
    learning_rate: float
    recovered: bool
    rows: list[int] | None = None
    cause: Cause | None = None


def robust_deviation(values: Sequence[float], centre: float) -> float:
    """The standard deviation of ``values`` by their median distance from ``centre``, which outliers do not change."""
    return _DEVIATIONS_PER_MAD * median(abs(value - centre) for value in values)


def find_spikes(steps: Sequence[Step]) -> list[Spike]:
    """Spikes of the training loss, each with the step at its peak.

    A spike ends when two losses in a row are below the threshold that its first one exceeded.
    """
    logs = [math.log(max(step.loss, 1e-9)) for step in steps]
    levels = [median(logs[place - SPIKE_LEVEL : place]) for place in range(SPIKE_LEVEL, len(logs))]
    jumps = [now - level for now, level in zip(logs[SPIKE_LEVEL:], levels, strict=True)]
    spikes, place = [], SPIKE_LEVEL + SPIKE_FEWEST
    while place < len(logs):
        judged = place - SPIKE_LEVEL  # levels and jumps begin this much later than steps
        recent = jumps[max(0, judged - SPIKE_WINDOW) : judged]
        centre = median(recent)
        # Where the loss falls steeply the usual jump is downwards; a loss that stays level is no spike.
        threshold = levels[judged] + max(0.0, centre)
        threshold += SPIKE_DEVIATIONS * max(robust_deviation(recent, centre), SPIKE_LEAST_DEVIATION)
        if logs[place] <= threshold:
            place += 1
            continue
        end = next((i for i in range(place + 1, len(logs)) if max(logs[i : i + 2]) <= threshold), len(logs))
        peak, before = max(steps[place:end], key=lambda step: step.loss), steps[judged:place]
        spikes.append(
            Spike(
                peak.step, steps[place].step, steps[end - 1].step, peak.window, epoch_of(peak),
                peak.loss, median(step.loss for step in before),
                peak.grad_norm, median(step.grad_norm for step in before),
                peak.learning_rate, end < len(logs),
            )
        )  # fmt: skip
        place = end
    return spikes


def with_rows(run: Run, spikes: list[Spike]) -> list[Spike]:
    """``spikes`` with the row numbers of the windows at their peaks, computed from the seed and the epoch.

    ``rows`` stay None without the prepared data, or if a setting that decides the order was changed during the run.
    """
    changed = any(line.startswith(_DECIDE_THE_ORDER) for line in run.spec_changes)
    if not spikes or not run.data or changed:
        return spikes
    from llamatune.data.batches import open_prepared
    from llamatune.training.schedule import Schedule

    try:
        schedule = Schedule(run.spec, open_prepared(*run.found.data.train_paths).train)
    except LlamatuneError:
        return spikes
    batches = (schedule.passes(spike.window - 1) for spike in spikes)  # the log counts windows from 1
    rows = [sorted(row for batch in window for row in batch.rows) for window in batches]
    return [replace(spike, rows=found) for spike, found in zip(spikes, rows, strict=True)]
