"""Over-fitting of a run: whether its validation loss rose from its lowest level while its training loss did not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

from llamatune.events import EvalDone, Step
from llamatune.reporting.averages import epoch_of, mean_loss
from llamatune.reporting.noise import MEDIAN_NOISE, robust_deviation

# Below this the rise is none: 2 % of a loss of 1.5 are 3 % of the perplexity.
RISE = 0.02
# Evaluations of one run are of the same rows, so they differ little by chance. From so many on, that noise is measured,
# and the rise must exceed it by four deviations: of 100 plateaus at most 2 are then called over-fitting where the noise
# is 1 %, and 8 where it is 2 % (docs/report.md has the rates). A rise that only the last one shows must be twice
# as large.
FEWEST, DEVIATIONS, LAST_ALONE = 8, 4.0, 2.0
# The noise is that of the later half: at the start the loss falls so steeply that its bends look like noise.
LATE_SHARE = 2
# Of many evaluations a level is the median of a fifth (odd, at least three), whose noise is smaller than one's.
LEVEL_SHARE = 5


@dataclass(frozen=True)
class Validation:
    """Whether the validation loss rose after its lowest point.

    ``verdict`` is ``over-fitting`` (it rose, and its gap to the training loss grew with it), ``rising`` (the training
    loss did not fall meanwhile), ``not clear`` (a rise that may be chance) or ``no over-fitting``. A gap is the
    validation loss minus the mean training loss since the evaluation before. ``rise`` is relative, from the lowest to
    the last of all evaluations; ``noise`` is the relative deviation of one evaluation, None where it cannot be
    measured.
    """

    verdict: str
    turned_step: int
    turned_epoch: int
    lowest_loss: float
    last_loss: float
    rise: float
    noise: float | None
    gap_at_turn: float
    gap_at_end: float


def judge_validation(steps: Sequence[Step], evaluations: Sequence[EvalDone]) -> Validation | None:
    """Over-fitting, judged by the evaluations; None with fewer than two of them."""
    if len(evaluations) < 2 or not steps:
        return None
    losses = [evaluation.loss for evaluation in evaluations]
    turn = losses.index(min(losses))

    def trained_before(index: int) -> list[Step]:
        since = evaluations[index - 1].step if index else 0
        return [step for step in steps if since < step.step <= evaluations[index].step]

    def train_loss(index: int) -> float:
        return mean_loss(trained_before(index))

    logs = [math.log(max(loss, 1e-9)) for loss in losses]
    noise = _noise(logs)
    gap_at_turn, gap_at_end = losses[turn] - train_loss(turn), losses[-1] - train_loss(len(losses) - 1)
    verdict = _rise(logs, noise)
    if verdict == "over-fitting" and gap_at_end - gap_at_turn < (losses[-1] - losses[turn]) / 2:
        verdict = "rising"
    if verdict == "over-fitting" and turn == len(losses) - 1:
        verdict = "not clear"
    # A mean over the first updates is of a steep fall, so the gap there says little. A run that over-fits goes on
    # learning its own rows, or its training loss is already low.
    level_at_turn, level_at_end = (_late_level(trained_before(index)) for index in (turn, len(losses) - 1))
    if verdict == "over-fitting" and level_at_end >= max(level_at_turn, losses[turn]):
        verdict = "rising"
    turned = next((step for step in steps if step.step >= evaluations[turn].step), steps[-1])
    rise = losses[-1] / losses[turn] - 1 if losses[turn] else 0.0
    return Validation(
        verdict, evaluations[turn].step, epoch_of(turned), losses[turn], losses[-1], rise, noise, gap_at_turn,
        gap_at_end,
    )  # fmt: skip


def without_over_fitting(found: Validation) -> Validation:
    """``found`` of a run whose training loss rose, too: that is no over-fitting."""
    return replace(found, verdict="rising") if found.verdict == "over-fitting" else found


def _late_level(steps: Sequence[Step]) -> float:
    """The median loss of the later half."""
    return median(step.loss for step in steps[len(steps) // 2 :])


def _rise(logs: Sequence[float], noise: float | None) -> str:
    """``over-fitting``, ``not clear`` or ``no over-fitting``, by logarithms of validation losses alone."""
    width = _width(len(logs))
    levels = [median(logs[place : place + width]) for place in range(len(logs) - width + 1)]
    lowest = min(levels)
    after = levels[levels.index(lowest) + 1 :]
    if not after:
        return "no over-fitting"
    # A level of several evaluations needs no second one beside it.
    rise = (after[-1] if width > 1 else mean(after[-2:])) - lowest
    if rise <= math.log1p(RISE):
        return "no over-fitting"
    needed = math.log1p(RISE) * (LAST_ALONE if len(after) == 1 and width == 1 else 1)
    if noise is not None:
        needed = max(needed, DEVIATIONS * noise * (MEDIAN_NOISE / math.sqrt(width) if width > 1 else 1.0))
    return "over-fitting" if rise > needed else "not clear"


def _width(count: int) -> int:
    """Evaluations in a level: an odd number."""
    return max(1, (count // LEVEL_SHARE - 1) // 2 * 2 + 1)


def _noise(logs: Sequence[float]) -> float | None:
    """The deviation of one evaluation, from third differences of the later ones, which are zero on any parabola."""
    if len(logs) < FEWEST:
        return None
    late = logs[-max(FEWEST, len(logs) // LATE_SHARE) :]
    runs_of_four = [late[start : start + 4] for start in range(len(late) - 3)]
    # The variance of a third difference is 20 times that of one error: 1 + 9 + 9 + 1.
    return robust_deviation([a - 3 * b + 3 * c - d for a, b, c, d in runs_of_four], 0.0) / math.sqrt(20)
