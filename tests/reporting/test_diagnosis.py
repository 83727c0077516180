"""The trend on curves with known answers, with noise; no finding where there is none."""

from __future__ import annotations

import math
import random

import numpy
import pytest
from report_material import falling, make_steps, noisy

from llamatune.reporting.diagnosis import diagnose
from llamatune.reporting.report_text import findings
from llamatune.reporting.trend import Trend, judge_trend, theil_sen


def _trend(losses: list[float]) -> Trend:
    found = judge_trend(make_steps(losses))
    assert found is not None
    return found


def test_the_line_is_the_median_of_all_slopes_and_its_bounds_are_sens() -> None:
    losses = noisy(falling(90), 0.1)
    found = _trend(losses)
    slopes = sorted(math.log(losses[j] / losses[i]) / (j - i) for i in range(60, 90) for j in range(i + 1, 90))
    assert (found.first_step, found.last_step) == (61, 90)
    assert found.median_loss == pytest.approx(float(numpy.median(losses[60:])))
    assert found.change == pytest.approx(math.exp(float(numpy.median(slopes)) * 29) - 1)
    # 435 pairs, 1.96 deviations of Kendall's statistic are 109.9: Sen's ranks are 162.6 and 273.4 of 435, from 1.
    assert found.lowest == pytest.approx(math.exp(slopes[163] * 29) - 1, rel=0.02)
    assert found.highest == pytest.approx(math.exp(slopes[271] * 29) - 1, rel=0.02)


@pytest.mark.parametrize("deviation", [0.0, 0.3])
def test_a_loss_that_falls_to_nothing_falls_by_less_than_all_of_itself(deviation: float) -> None:
    """A line of the losses themselves would cross zero, and tell of more than 100 %."""
    halving = [2.0 ** (-place / 6) for place in range(90)]
    found = _trend(noisy(halving, deviation))
    assert found.verdict == "falling"
    assert found.change == pytest.approx(2 ** (-29 / 6) - 1, abs=0.02)
    assert -1 < found.lowest <= found.change <= found.highest < -0.9
    line = numpy.polyfit(range(30), halving[60:], 1)[0] * 29 / numpy.median(halving[60:])
    assert line < -1.6  # what a straight line makes of it


def test_the_interval_holds_the_true_slope_of_19_lines_in_20() -> None:
    held = 0
    for seed in range(200):
        chance = random.Random(seed)
        x = list(range(60))
        _, lowest, highest = theil_sen(x, [0.02 * at + chance.gauss(0, 1) for at in x])
        held += lowest <= 0.02 <= highest
    assert 183 <= held <= 198


def test_of_a_long_run_medians_of_neighbours_are_fitted() -> None:
    slope, lowest, highest = theil_sen(range(5000), noisy([2 - place / 5000 for place in range(5000)], 0.1))
    assert slope == pytest.approx(-1 / 5000, rel=0.05)
    assert lowest < -1 / 5000 < highest


def test_one_outlier_does_not_turn_the_trend() -> None:
    losses = noisy([4.0 - place / 100 for place in range(69)], 0.02)
    before = _trend(losses)
    losses[50] *= 3
    after = _trend(losses)
    assert after.verdict == before.verdict == "falling"
    assert after.change == pytest.approx(before.change, rel=0.15)
    line = numpy.polyfit(range(46, 69), losses[46:], 1)[0] * 22 / numpy.mean(losses[46:])
    assert abs(line / before.change - 1) > 0.4  # what least squares makes of it


@pytest.mark.parametrize(
    ("curve", "verdict"),
    [
        ([1.0] * 3000, "plateau"),
        ([2 - place / 3000 for place in range(3000)], "falling"),
        ([1 + place / 3000 for place in range(3000)], "rising"),
    ],
)
def test_trends_are_told_through_noise(curve: list[float], verdict: str) -> None:
    """Two standard errors are 95 %: one of twenty may be told otherwise."""
    verdicts = [_trend(noisy(curve, 0.15, seed)).verdict for seed in range(20)]
    assert verdicts.count(verdict) >= 18


def test_a_short_noisy_run_is_not_called_a_plateau() -> None:
    verdicts = [_trend(noisy([1.0] * 60, 0.4, seed)).verdict for seed in range(20)]
    assert "plateau" not in verdicts
    assert verdicts.count("too noisy to tell") >= 15


def test_a_spike_that_passed_leaves_the_trend_as_it_was() -> None:
    steady, chance = noisy([1.0] * 900, 0.02), random.Random(1)
    spiked = list(steady)
    for place in chance.sample(range(600, 900), 3):
        spiked[place] *= 30
    diagnosis = diagnose(make_steps(spiked), [])
    assert len(diagnosis.spikes) == 3
    assert diagnosis.trend is not None
    assert diagnosis.trend.verdict == "plateau"


@pytest.mark.parametrize("count", [0, 1, 2, 29])
def test_too_few_steps_are_judged_by_nothing(count: int) -> None:
    found = diagnose(make_steps([1.0] * count), [])
    assert (found.spikes, found.validation, found.trend) == ([], None, None)
    assert len(findings(found)) == 4
