"""Spikes of the training loss, from the second step on: where they are, and which rows were trained on there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from llamatune.errors import LlamatuneError
from llamatune.events import Step
from llamatune.reporting.averages import epoch_of
from llamatune.reporting.noise import logarithms, noise_of, robust_deviation
from llamatune.reporting.run_reader import Run

# A loss is compared with the median of the ten steps before it. It is a spike if it is higher by this many robust
# deviations more than recent losses were. The comparison is by ratio, because the noise of batches is multiplicative
# and skewed; five deviations of its logarithm occur by chance in one of ten thousand steps.
SPIKE_DEVIATIONS, SPIKE_LEVEL = 5.0, 10
# Enough jumps for a steady deviation, few enough that training has not changed much meanwhile.
SPIKE_WINDOW, SPIKE_FEWEST = 50, 10
# The least deviation, for curves without noise: a rise of less than a tenth is never a spike.
SPIKE_LEAST_DEVIATION = 0.02
# The first twenty steps have too few before them for that. There the loss falls, so each is compared with the lowest of
# the five before, and is in a rise if it is higher by 6.5 deviations of the whole run's noise, and by at least a
# quarter: the lowest of five is itself about one deviation below its level. A rise is over two deviations above it.
EARLY_DEVIATIONS, EARLY_LEAST, EARLY_BEFORE, EARLY_OVER = 6.5, math.log(1.25), 5, 2.0
EARLY_STEPS = SPIKE_LEVEL + SPIKE_FEWEST

_DECIDE_THE_ORDER = ("data.", "training.seed", "training.micro_batch_size", "training.gradient_accumulation_steps")


@dataclass(frozen=True)
class Cause:
    """``kind`` is ``learning rate``, ``rows`` or ``overflow``; ``evidence`` are clauses about this run's log."""

    kind: str
    evidence: list[str]


@dataclass(frozen=True)
class Spike:
    """A stretch of losses far above those before it, and its peak.

    ``typical_loss`` and ``typical_grad_norm`` are medians of the ten steps before. Of a spike that began within the
    first twenty steps (``early``) they are the lowest loss and the median norm of the five before. ``rows`` are the row
    numbers, in the input files, of the peak's window; None if they are not known. ``recovered``: the loss fell below
    the threshold again, or, of an early one, nearly to ``typical_loss``. ``cause`` is the likely one.
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
    early: bool = False
    rows: list[int] | None = None
    cause: Cause | None = None


def find_spikes(steps: Sequence[Step]) -> list[Spike]:
    """Spikes of the training loss, each with the step at its peak.

    A spike ends when two losses in a row are below the threshold that its first one exceeded.
    """
    logs = logarithms([step.loss for step in steps])
    early, place = _early_spikes(steps, logs)
    return early + list(_late_spikes(steps, logs, place))


def _early_spikes(steps: Sequence[Step], logs: Sequence[float]) -> tuple[list[Spike], int]:
    """Spikes that began within the first twenty steps, and where to look for later ones."""
    noise = max(noise_of([step.loss for step in steps]), SPIKE_LEAST_DEVIATION)
    spikes, place = list[Spike](), 1
    while place < min(EARLY_STEPS, len(logs)):
        begin = max(0, place - EARLY_BEFORE)
        lowest = min(logs[begin:place])
        if logs[place] <= lowest + max(EARLY_DEVIATIONS * noise, EARLY_LEAST):
            place += 1
            continue
        end = _end(logs, place, lowest + EARLY_OVER * noise)
        spikes.append(_spike(steps, begin, place, end, early=True))
        place = end
    return spikes, max(place, EARLY_STEPS)


def _late_spikes(steps: Sequence[Step], logs: Sequence[float], place: int) -> Iterator[Spike]:
    levels = [median(logs[at - SPIKE_LEVEL : at]) for at in range(SPIKE_LEVEL, len(logs))]
    jumps = [now - level for now, level in zip(logs[SPIKE_LEVEL:], levels, strict=True)]
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
        end = _end(logs, place, threshold)
        yield _spike(steps, judged, place, end, early=False)
        place = end


def _end(logs: Sequence[float], place: int, level: float) -> int:
    """Where two losses in a row, the first ones after ``place``, are not above ``level``."""
    return next((at for at in range(place + 1, len(logs)) if max(logs[at : at + 2]) <= level), len(logs))


def _spike(steps: Sequence[Step], begin: int, place: int, end: int, early: bool) -> Spike:
    """The spike of ``steps[place:end]``, whose usual values are those of ``steps[begin:place]``."""
    peak, before = max(steps[place:end], key=lambda step: step.loss), steps[begin:place]
    usual = min if early else median
    return Spike(
        peak.step, steps[place].step, steps[end - 1].step, peak.window, epoch_of(peak),
        peak.loss, usual(step.loss for step in before),
        peak.grad_norm, median(step.grad_norm for step in before),
        peak.learning_rate, end < len(steps), early,
    )  # fmt: skip


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
