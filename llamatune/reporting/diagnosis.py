"""Over-fitting and trend of a run, and all findings together: spikes, validation, whether the loss still falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from llamatune.events import EvalDone, Step
from llamatune.reporting.averages import epoch_of, mean_loss
from llamatune.reporting.spikes import Spike, find_spikes, robust_deviation

# Validation losses come from the same rows each time; a rise of less than 1 % above the lowest changes no answer. If
# they are noisy (few rows), the rise must also exceed this many deviations of their own noise, and measuring that noise
# takes some evaluations.
OVERFIT_RISE, OVERFIT_DEVIATIONS, OVERFIT_FEWEST = 0.01, 5.0, 8
# The rise must hold for the last two evaluations, if there are two after the lowest.
OVERFIT_LAST = 2
# The trend is fitted to the last third of the steps, at least ten of them.
TREND_SHARE, TREND_FEWEST = 3, 10
# A plateau: either the change over the last third is within its noise (two standard errors), and the noise is below 5 %
# of the loss; or change and noise together are below 1 %.
TREND_NOISE, TREND_NOTHING = 0.05, 0.01


@dataclass(frozen=True)
class Validation:
    """Whether the validation loss rose after its lowest point.

    ``verdict`` is ``over-fitting`` (it rose while the training loss fell), ``rising`` (both rose) or
    ``no over-fitting``. A gap is the validation loss minus the mean training loss since the evaluation before.
    ``rise`` is relative, from the lowest to the last.
    """

    verdict: str
    turned_step: int
    turned_epoch: int
    lowest_loss: float
    last_loss: float
    rise: float
    gap_at_turn: float
    gap_at_end: float


@dataclass(frozen=True)
class Trend:
    """A line fitted to the losses of the last third of the steps, without spikes.

    ``verdict`` is ``falling``, ``rising``, ``plateau`` or ``too noisy to tell``. ``change`` is that of the line from
    ``first_step`` to the end, relative to the mean loss; ``uncertainty`` is two of its standard errors.
    """

    verdict: str
    first_step: int
    mean_loss: float
    change: float
    uncertainty: float


@dataclass(frozen=True)
class Diagnosis:
    """All findings; None where there is too little data."""

    spikes: list[Spike]
    validation: Validation | None
    trend: Trend | None


def diagnose(steps: Sequence[Step], evaluations: Sequence[EvalDone]) -> Diagnosis:
    """All findings about a run, from its log."""
    spikes = find_spikes(steps)
    return Diagnosis(spikes, judge_validation(steps, evaluations), judge_trend(steps, spikes))


def _evaluation_noise(losses: Sequence[float]) -> float:
    """The standard deviation of one evaluation, from third differences, which are zero on any parabola."""
    runs_of_four = [losses[start : start + 4] for start in range(len(losses) - 3)]
    thirds = [a - 3 * b + 3 * c - d for a, b, c, d in runs_of_four]
    # The variance of a third difference is 20 times that of one error: 1 + 9 + 9 + 1.
    return robust_deviation(thirds, 0.0) / math.sqrt(20) if len(losses) >= OVERFIT_FEWEST else 0.0


def judge_validation(steps: Sequence[Step], evaluations: Sequence[EvalDone]) -> Validation | None:
    """Over-fitting, judged by the evaluations; None with fewer than two of them."""
    if len(evaluations) < 2 or not steps:
        return None
    losses = [evaluation.loss for evaluation in evaluations]
    turn = losses.index(min(losses))
    lowest, after = losses[turn], losses[turn + 1 :]

    def train_loss(index: int) -> float:
        since = evaluations[index - 1].step if index else 0
        return mean_loss([step for step in steps if since < step.step <= evaluations[index].step])

    needed = max(OVERFIT_RISE * abs(lowest), OVERFIT_DEVIATIONS * _evaluation_noise(losses))
    rose = bool(after) and min(after[-OVERFIT_LAST:]) > lowest + needed
    at_turn, at_end = train_loss(turn), train_loss(len(losses) - 1)
    verdict = "no over-fitting" if not rose else "over-fitting" if at_end < at_turn else "rising"
    turned = next((step for step in steps if step.step >= evaluations[turn].step), steps[-1])
    rise = losses[-1] / lowest - 1 if lowest else 0.0
    return Validation(
        verdict, evaluations[turn].step, epoch_of(turned), lowest, losses[-1], rise,
        gap_at_turn=lowest - at_turn, gap_at_end=losses[-1] - at_end,
    )  # fmt: skip


def judge_trend(steps: Sequence[Step], spikes: Sequence[Spike] = ()) -> Trend | None:
    """The least-squares line of the last third, without spikes that ended; None with too few steps."""
    in_spike = {
        number for spike in spikes if spike.recovered for number in range(spike.first_step, spike.last_step + 1)
    }
    last = [step for step in steps[len(steps) - len(steps) // TREND_SHARE :] if step.step not in in_spike]
    if len(last) < TREND_FEWEST:
        return None
    mean, centre = fmean(step.loss for step in last), fmean(step.step for step in last)
    spread = sum((step.step - centre) ** 2 for step in last)
    slope = sum((step.step - centre) * (step.loss - mean) for step in last) / spread
    residual = sum((step.loss - mean - slope * (step.step - centre)) ** 2 for step in last)
    error = math.sqrt(residual / (len(last) - 2) / spread)
    length = (last[-1].step - last[0].step) / mean if mean else 0.0
    change, uncertainty = slope * length, 2 * error * length
    hidden = abs(change) <= uncertainty
    if abs(change) + uncertainty < TREND_NOTHING or (hidden and uncertainty < TREND_NOISE):
        verdict = "plateau"
    elif hidden:
        verdict = "too noisy to tell"
    else:
        verdict = "falling" if change < 0 else "rising"
    return Trend(verdict, last[0].step, mean, change, uncertainty)
