"""The end of a run against its start: whether the loss fell below that of the untrained model, or diverged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from llamatune.events import EvalDone, Step
from llamatune.reporting.spikes import robust_deviation

# A level is the median of so many neighbouring losses, which one batch alone does not move.
LEVEL = 5
# The end is the last tenth of the steps, at least one level.
END_SHARE = 10
# Validation losses come from the same rows each time: 1 % above or below the untrained loss is a change.
COURSE_CHANGE = 0.01
# Training rows differ from validation rows, by less than this in a random split: a training loss that ends above 95 %
# of the untrained validation loss did not fall. Where it did, a validation loss that rose is over-fitting.
COURSE_ROWS = 0.05
# Without validation the start is the loss of the first update, before which nothing was trained. A single batch is
# noisy: the end is above or below it by this many deviations, and by at least 2 %.
COURSE_DEVIATIONS, COURSE_LEAST = 3.0, 0.02
# A level that rose above the start by five deviations, and by at least a tenth, is no noise: the run left its start
# upwards. If it also ends above the start, no further test is needed.
PEAK_DEVIATIONS, PEAK_LEAST = 5.0, 0.1


@dataclass(frozen=True)
class Course:
    """The loss at the end against that of the untrained model.

    ``verdict`` is ``diverged`` (it ended above), ``unchanged``, ``recovered`` (it rose far above before it fell below)
    or ``learned``. ``start_of`` names the rows of both losses: ``validation`` or ``training``; those of training are
    the first update's loss, and the median of the last updates'. ``peak_loss`` is the highest level of the training
    loss, at ``peak_step``; ``left_step`` is the first step whose level is far above the start, None if none is.
    """

    verdict: str
    start_of: str
    start_loss: float
    end_loss: float
    change: float
    peak_loss: float
    peak_step: int
    left_step: int | None


def judge_course(steps: Sequence[Step], evaluations: Sequence[EvalDone], at_start: EvalDone | None) -> Course | None:
    """The end against the start; None with fewer than two levels of steps, if there is no validation loss at both ends.

    ``at_start`` is the validation loss before training.
    """
    validated = at_start is not None and bool(evaluations)
    if not steps or (not validated and len(steps) < 2 * LEVEL):
        return None
    levels = [median(step.loss for step in steps[place : place + LEVEL]) for place in range(len(steps) - LEVEL + 1)]
    levels = levels or [median(step.loss for step in steps)]
    start = at_start.loss if at_start is not None else steps[0].loss
    trained = median(step.loss for step in steps[-max(LEVEL, len(steps) // END_SHARE) :])
    noise = _noise(steps)
    highest = max(range(len(levels)), key=levels.__getitem__)
    rose_far = start * _factor(max(PEAK_DEVIATIONS * noise, PEAK_LEAST))
    middles = [steps[min(place + LEVEL // 2, len(steps) - 1)].step for place in range(len(levels))]
    left = next((step for step, level in zip(middles, levels, strict=True) if level > rose_far), None)
    if validated:
        assert at_start is not None
        end, least = evaluations[-1].loss, COURSE_CHANGE
        above = end > start * (1 + least) and trained > start * (1 - COURSE_ROWS)
    else:
        end, least = trained, _factor(max(COURSE_DEVIATIONS * noise, COURSE_LEAST)) - 1
        above = end > start * (1 + least) or (left is not None and end > start)
    if above:
        verdict = "diverged"
    elif left is not None:
        verdict = "recovered"
    else:
        verdict = "unchanged" if end * (1 + least) >= start else "learned"
    return Course(
        verdict, "validation" if validated else "training", start, end, end / start - 1 if start else 0.0,
        levels[highest], middles[highest], left,
    )  # fmt: skip


def _factor(rise: float) -> float:
    return math.exp(min(rise, 50.0))


def _noise(steps: Sequence[Step]) -> float:
    """The robust deviation of the logarithm of one loss, by differences of neighbours, which a slow change leaves."""
    logs = [math.log(max(step.loss, 1e-9)) for step in steps]
    differences = [after - before for before, after in itertools.pairwise(logs)]
    return robust_deviation(differences, 0.0) / math.sqrt(2) if differences else 0.0
