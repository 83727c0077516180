"""Whether the loss still falls: the Theil-Sen line of the last third's logarithms, with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

from llamatune.events import Step
from llamatune.reporting.spikes import Spike

# The trend is fitted to the last third of the steps, at least ten of them.
TREND_SHARE, TREND_FEWEST = 3, 10
# A plateau: either the change over the last third is within its interval, and half of that is below 5 % of the loss; or
# change and half of the interval together are below 1 %.
TREND_NOISE, TREND_NOTHING = 0.05, 0.01
# Slopes of all pairs of so many points are quickly sorted; of more steps, medians of neighbours are the points.
TREND_POINTS = 1000
_LEAST_LOSS = 1e-9
_MOST = math.log(1e9)
"""The largest relative change that is reported: a loss may be nearly zero."""
_TWO_SIDED_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Trend:
    """A line through the logarithms of the last third's losses, without spikes that ended.

    ``verdict`` is ``falling``, ``rising``, ``plateau`` or ``too noisy to tell``. ``change`` is that of the loss along
    the line from ``first_step`` to ``last_step``, as a share of where the line begins, so it is above -1; ``lowest``
    and ``highest`` bound it with 95 % confidence.
    """

    verdict: str
    first_step: int
    last_step: int
    median_loss: float
    change: float
    lowest: float
    highest: float


def judge_trend(steps: Sequence[Step], spikes: Sequence[Spike] = ()) -> Trend | None:
    """The line of the last third, without spikes that ended; None with too few steps."""
    in_spike = {
        number for spike in spikes if spike.recovered for number in range(spike.first_step, spike.last_step + 1)
    }
    last = [step for step in steps[len(steps) - len(steps) // TREND_SHARE :] if step.step not in in_spike]
    if len(last) < TREND_FEWEST:
        return None
    length = last[-1].step - last[0].step
    # The noise of batches is a factor, and a loss that goes on falling falls by factors: a line of losses would cross
    # zero.
    slopes = theil_sen([step.step for step in last], [math.log(max(step.loss, _LEAST_LOSS)) for step in last])
    change, lowest, highest = (math.expm1(min(slope * length, _MOST)) for slope in slopes)
    hidden, half = lowest <= 0 <= highest, (highest - lowest) / 2
    if abs(change) + half < TREND_NOTHING or (hidden and half < TREND_NOISE):
        verdict = "plateau"
    elif hidden:
        verdict = "too noisy to tell"
    else:
        verdict = "falling" if change < 0 else "rising"
    level = median(step.loss for step in last)
    return Trend(verdict, last[0].step, last[-1].step, level, change, lowest, highest)


def theil_sen(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """The median of the slopes of all pairs of points, and its bounds with 95 % confidence.

    An outlier changes it little: 29 % of the points may be any. The bounds are those of Sen (1968), section 4, by the
    variance of Kendall's statistic without ties, n (n - 1) (2 n + 5) / 18. ``x`` has no value twice, in rising order.
    """
    import numpy

    group = -(-len(x) // TREND_POINTS)
    points = [(median(x[begin : begin + group]), median(y[begin : begin + group])) for begin in range(0, len(x), group)]
    place, value = numpy.array(points, dtype=numpy.float64).T
    first, second = numpy.triu_indices(len(points), 1)
    slopes = numpy.sort((value[second] - value[first]) / (place[second] - place[first]))
    count, pairs = len(points), len(slopes)
    spread = _TWO_SIDED_95 * math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    lowest = max(0, round((pairs - spread) / 2))
    highest = min(pairs - 1, round((pairs + spread) / 2) - 1)
    return float(numpy.median(slopes)), float(slopes[lowest]), float(slopes[highest])
