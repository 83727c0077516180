"""What went wrong, in numbers: spikes, over-fitting, and whether the loss still falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from llamatune.reporting.averages import epoch_of, mean_loss
from llamatune.reporting.run_reader import Evaluation, Step

# A spike's loss jumps this many robust deviations higher above the median of the ten steps before it than losses did
# lately. Jumps are ratios: the noise of batches is multiplicative and skewed, and five deviations of its logarithm come
# about by chance in one of ten thousand steps.
SPIKE_DEVIATIONS, SPIKE_LEVEL = 5.0, 10
# Enough jumps for a steady deviation, few enough that training has not changed much meanwhile.
SPIKE_WINDOW, SPIKE_FEWEST = 50, 10
# A curve without noise has no deviation to count in: a rise of less than a tenth is never a spike.
SPIKE_LEAST_DEVIATION = 0.02
# Validation losses come from the same rows each time; a rise of 1 % above the lowest is seen in no answer. Where they
# are noisy all the same (few rows), the rise has to exceed this many of their own deviations too, which take some
# evaluations to measure.
OVERFIT_RISE, OVERFIT_DEVIATIONS, OVERFIT_FEWEST = 0.01, 5.0, 8
# The rise has to hold for the last two evaluations, if there are two after the lowest.
OVERFIT_LAST = 2
# The last third of the steps tells where a run ends up; with fewer than ten in it, noise is all there is.
TREND_SHARE, TREND_FEWEST = 3, 10
# A plateau: the change over the last third is within its noise (two standard errors), and that below 5 % of the loss,
# or nothing could be seen through it; or the change is surely below 1 %, however little noise there is.
TREND_NOISE, TREND_NOTHING = 0.05, 0.01

_DEVIATIONS_PER_MAD = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""


@dataclass(frozen=True)
class Spike:
    """A stretch of losses far above those before it, and its peak.

    ``typical_loss`` and ``typical_grad_norm`` are medians of the ten steps before; ``rows`` are the input files' row
    numbers in the peak's window, None where they cannot be told. ``recovered``: the loss came back below the threshold.
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


@dataclass(frozen=True)
class Validation:
    """How the validation loss went on after its lowest point.

    ``verdict`` is ``over-fitting`` (it rose while the training loss fell), ``rising`` (so did the training loss) or
    ``no over-fitting``. A gap is validation minus mean training loss since the evaluation before; ``rise`` is from the
    lowest to the last, relative.
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
    """A line through the losses of the last third of the steps, spikes left out.

    ``verdict`` is ``falling``, ``rising``, ``plateau`` or ``too noisy to tell``; ``change`` is what the line changes by
    from ``first_step`` to the end, relative to the mean loss there, give or take ``uncertainty`` (two standard errors).
    """

    verdict: str
    first_step: int
    mean_loss: float
    change: float
    uncertainty: float


@dataclass(frozen=True)
class Diagnosis:
    """All findings; None where there is too little to judge by."""

    spikes: list[Spike]
    validation: Validation | None
    trend: Trend | None


def diagnose(steps: Sequence[Step], evaluations: Sequence[Evaluation]) -> Diagnosis:
    """Judge a run by its log."""
    spikes = find_spikes(steps)
    return Diagnosis(spikes, judge_validation(steps, evaluations), judge_trend(steps, spikes))


def _deviation(values: Sequence[float], centre: float) -> float:
    return _DEVIATIONS_PER_MAD * median(abs(value - centre) for value in values)


def find_spikes(steps: Sequence[Step]) -> list[Spike]:
    """Spikes of the training loss, each with the step at its peak.

    A spike ends when two losses in a row are below the threshold that its first one broke.
    """
    logs = [math.log(max(step.loss, 1e-9)) for step in steps]
    levels = [median(logs[place - SPIKE_LEVEL : place]) for place in range(SPIKE_LEVEL, len(logs))]
    jumps = [now - level for now, level in zip(logs[SPIKE_LEVEL:], levels, strict=True)]
    spikes, place = [], SPIKE_LEVEL + SPIKE_FEWEST
    while place < len(logs):
        level, usual = (
            levels[place - SPIKE_LEVEL],
            jumps[max(0, place - SPIKE_LEVEL - SPIKE_WINDOW) : place - SPIKE_LEVEL],
        )
        centre = median(usual)
        # Where the loss falls steeply the usual jump is downwards; standing still is no spike.
        threshold = level + max(0.0, centre)
        threshold += SPIKE_DEVIATIONS * max(_deviation(usual, centre), SPIKE_LEAST_DEVIATION)
        if logs[place] <= threshold:
            place += 1
            continue
        end = next((i for i in range(place + 1, len(logs)) if max(logs[i : i + 2]) <= threshold), len(logs))
        peak, before = max(steps[place:end], key=lambda step: step.loss), steps[place - SPIKE_LEVEL : place]
        spikes.append(
            Spike(
                peak.step,
                steps[place].step,
                steps[end - 1].step,
                peak.window,
                epoch_of(peak),
                peak.loss,
                median(step.loss for step in before),
                peak.grad_norm,
                median(step.grad_norm for step in before),
                peak.learning_rate,
                end < len(logs),
            )
        )
        place = end
    return spikes


def _evaluation_noise(losses: Sequence[float]) -> float:
    """The deviation of single evaluations, from third differences: they are zero on any parabola."""
    thirds = [a - 3 * b + 3 * c - d for a, b, c, d in zip(losses, losses[1:], losses[2:], losses[3:], strict=False)]
    # Independent errors of weights 1, 3, 3 and 1 add up to 20 times the variance of one.
    return _deviation(thirds, 0.0) / math.sqrt(20) if len(losses) >= OVERFIT_FEWEST else 0.0


def judge_validation(steps: Sequence[Step], evaluations: Sequence[Evaluation]) -> Validation | None:
    """Find where the validation loss turned; None with fewer than two evaluations."""
    if len(evaluations) < 2 or not steps:
        return None
    losses = [found.loss for found in evaluations]
    turn = losses.index(min(losses))
    lowest, after = losses[turn], losses[turn + 1 :]

    def train_loss(index: int) -> float:
        since = evaluations[index - 1].step if index else 0
        return mean_loss([step for step in steps if since < step.step <= evaluations[index].step])

    needed = max(OVERFIT_RISE * abs(lowest), OVERFIT_DEVIATIONS * _evaluation_noise(losses))
    rose = bool(after) and min(after[-OVERFIT_LAST:]) > lowest + needed
    gap_at_turn, gap_at_end = lowest - train_loss(turn), losses[-1] - train_loss(len(losses) - 1)
    learned = train_loss(len(losses) - 1) < train_loss(turn)
    turned = next((step for step in steps if step.step >= evaluations[turn].step), steps[-1])
    return Validation(
        "no over-fitting" if not rose else "over-fitting" if learned else "rising",
        evaluations[turn].step,
        epoch_of(turned),
        lowest,
        losses[-1],
        losses[-1] / lowest - 1 if lowest else 0.0,
        gap_at_turn,
        gap_at_end,
    )


def judge_trend(steps: Sequence[Step], spikes: Sequence[Spike] = ()) -> Trend | None:
    """Fit the last third by least squares, without spikes that passed; None with too few steps."""
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
