"""The course of a run: whether it learned, diverged or became unstable, by its end, its start and its lowest loss."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from llamatune.events import EvalDone, Step
from llamatune.reporting.noise import MEDIAN_NOISE, factor, noise_of

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
# The training loss rose again if its last tenth is above the lowest tenth by a fifth, by a twentieth of what it had
# fallen, and by 5.5 deviations of such a median, of which the lowest of some ten tenths is 1.5 below its level.
AGAIN_DEVIATIONS, AGAIN_LEAST, AGAIN_OF_FALL = 5.5, 0.2, 0.05


@dataclass(frozen=True)
class Course:
    """The loss at the end against that of the untrained model, and the training loss against its own lowest.

    ``verdict`` is ``diverged`` (it ended above), ``unstable`` (it ended below, and the training loss well above its
    lowest), ``unchanged``, ``recovered`` (it rose far above before it fell below) or ``learned``. ``start_of`` names
    the rows of the first two losses: ``validation`` or ``training``; those of training are the first update's loss, and
    the median of the last updates'. ``peak_loss`` is the highest level of the training loss, at ``peak_step``;
    ``left_step`` is the first step whose level is far above the start, None if none is.
    ``lowest_loss`` is the lowest median of a tenth of the steps, about ``lowest_step``; ``trained_loss`` that of the
    last tenth; ``rose_step`` the first after ``lowest_step`` where it is well above, None if the end is not.
    """

    verdict: str
    start_of: str
    start_loss: float
    end_loss: float
    change: float
    peak_loss: float
    peak_step: int
    left_step: int | None
    lowest_loss: float
    lowest_step: int
    trained_loss: float
    rose_step: int | None


def judge_course(steps: Sequence[Step], evaluations: Sequence[EvalDone], at_start: EvalDone | None) -> Course | None:
    """The end against the start; None with fewer than two levels of steps, if there is no validation loss at both ends.

    ``at_start`` is the validation loss before training.
    """
    validated = at_start is not None and bool(evaluations)
    if not steps or (not validated and len(steps) < 2 * LEVEL):
        return None
    levels, middles = _levels(steps, LEVEL)
    width = max(LEVEL, len(steps) // END_SHARE)
    start = at_start.loss if at_start is not None else steps[0].loss
    trained = median(step.loss for step in steps[-width:])
    noise = noise_of([step.loss for step in steps])
    highest = max(range(len(levels)), key=levels.__getitem__)
    rose_far = start * factor(max(PEAK_DEVIATIONS * noise, PEAK_LEAST))
    left = next((step for step, level in zip(middles, levels, strict=True) if level > rose_far), None)
    lowest_loss, lowest_step, rose = _rise_again(steps, width, noise)
    if validated:
        assert at_start is not None
        end, least = evaluations[-1].loss, COURSE_CHANGE
        above = end > start * (1 + least) and trained > start * (1 - COURSE_ROWS)
    else:
        end, least = trained, factor(max(COURSE_DEVIATIONS * noise, COURSE_LEAST)) - 1
        above = end > start * (1 + least) or (left is not None and end > start)
    if above:
        verdict = "diverged"
    elif rose is not None:
        verdict = "unstable"
    elif left is not None:
        verdict = "recovered"
    else:
        verdict = "unchanged" if end * (1 + least) >= start else "learned"
    return Course(
        verdict, "validation" if validated else "training", start, end, end / start - 1 if start else 0.0,
        levels[highest], middles[highest], left, lowest_loss, lowest_step, trained, rose,
    )  # fmt: skip


def _levels(steps: Sequence[Step], width: int) -> tuple[list[float], list[int]]:
    """The median loss of each ``width`` neighbouring steps, and the step in their middle."""
    losses = [step.loss for step in steps]
    window = sorted(losses[:width])
    levels = [_middle(window)]
    for place in range(width, len(losses)):
        del window[bisect.bisect_left(window, losses[place - width])]
        bisect.insort(window, losses[place])
        levels.append(_middle(window))
    return levels, [steps[min(place + width // 2, len(steps) - 1)].step for place in range(len(levels))]


def _middle(window: Sequence[float]) -> float:
    """The median of sorted values."""
    half = len(window) // 2
    return window[half] if len(window) % 2 else (window[half - 1] + window[half]) / 2


def _rise_again(steps: Sequence[Step], width: int, noise: float) -> tuple[float, int, int | None]:
    """The lowest level, the step of it, and the first step after it that is well above; None if the end is not."""
    levels, middles = _levels(steps, width)
    place = min(range(len(levels)), key=levels.__getitem__)
    lowest = levels[place]
    rise = max(AGAIN_DEVIATIONS * noise * MEDIAN_NOISE / math.sqrt(width), math.log1p(AGAIN_LEAST))
    well_above = max(lowest * factor(rise), lowest + AGAIN_OF_FALL * (max(levels[: place + 1]) - lowest))
    if levels[-1] <= well_above:
        return lowest, middles[place], None
    above = next(at for at in range(place, len(levels)) if levels[at] > well_above)
    return lowest, middles[place], middles[above]
