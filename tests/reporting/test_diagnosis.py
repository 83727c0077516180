"""Over-fitting and trend on curves with known answers, with noise; no finding where there is none."""

from __future__ import annotations

import math
import random

import numpy
import pytest
from report_material import falling, make_steps, noisy

from llamatune.events import EvalDone
from llamatune.reporting.diagnosis import diagnose, judge_validation
from llamatune.reporting.report_text import findings
from llamatune.reporting.trend import Trend, judge_trend, theil_sen


def _evaluations(curve: list[float], every: int, deviation: float, seed: int = 0) -> list[EvalDone]:
    return [EvalDone(every * (n + 1), loss) for n, loss in enumerate(noisy(curve, deviation, seed))]


@pytest.mark.parametrize(("count", "deviation"), [(4, 0.0), (10, 0.004), (40, 0.01)])
def test_over_fitting_is_found_where_validation_turned(count: int, deviation: float) -> None:
    """Validation falls for half of the run and rises for the other half, while the training loss goes on falling."""
    steps = make_steps(noisy([2 - place / 400 for place in range(400)], 0.05), epochs=10)
    bowl = [1.5 + 2 * ((n + 1) / count - 0.5) ** 2 for n in range(count)]
    found = judge_validation(steps, _evaluations(bowl, 400 // count, deviation))
    assert found is not None
    assert found.verdict == "over-fitting"
    assert abs(found.turned_step - 200) <= 2 * 400 // count
    assert found.turned_epoch == math.ceil(found.turned_step / 40)
    assert found.rise == pytest.approx(2.0 / 1.5 - 1, abs=0.05)
    # The training loss is 1.5 in the middle and 1.0 at the end.
    assert found.gap_at_turn == pytest.approx(0.0, abs=0.3)
    assert found.gap_at_end == pytest.approx(1.0, abs=0.3)


def test_gaps_compare_with_the_training_since_the_evaluation_before() -> None:
    steps = make_steps([4.0] * 10 + [2.0] * 10 + [1.0] * 10)
    found = judge_validation(steps, [EvalDone(10, 3.0), EvalDone(20, 2.5), EvalDone(30, 2.8)])
    assert found is not None
    assert (found.turned_step, found.lowest_loss, found.last_loss) == (20, 2.5, 2.8)
    assert found.gap_at_turn == pytest.approx(0.5)
    assert found.gap_at_end == pytest.approx(1.8)
    assert found.rise == pytest.approx(0.12)


@pytest.mark.parametrize(("count", "deviation"), [(2, 0.002), (5, 0.002), (12, 0.01), (40, 0.03)])
def test_validation_that_falls_or_stays_is_no_over_fitting(count: int, deviation: float) -> None:
    alarms = 0
    for seed in range(50):
        steps = make_steps(noisy(falling(10 * count), 0.1, seed))
        for curve in (falling(count), [1.0] * count, [1 + 1 / (n + 1) for n in range(count)]):
            found = judge_validation(steps, _evaluations(curve, 10, deviation, seed))
            assert found is not None
            alarms += found.verdict != "no over-fitting"
    assert alarms <= (0 if count < 12 else 2)  # of 150; five deviations that are measured are not quite five


def test_both_losses_rising_is_not_called_over_fitting() -> None:
    steps = make_steps([1.0] * 20 + [3.0] * 20)
    found = judge_validation(steps, [EvalDone(10, 1.1), EvalDone(20, 1.1), EvalDone(30, 3.1), EvalDone(40, 3.2)])
    assert found is not None
    assert found.verdict == "rising"


def test_one_evaluation_judges_nothing() -> None:
    assert judge_validation(make_steps([1.0, 1.0]), [EvalDone(2, 1.0)]) is None
    assert judge_validation([], []) is None


def _trend(losses: list[float]) -> Trend:
    found = judge_trend(make_steps(losses))
    assert found is not None
    return found


def test_the_line_is_the_median_of_all_slopes_and_its_bounds_are_sens() -> None:
    losses = noisy(falling(90), 0.1)
    found = _trend(losses)
    slopes = sorted((losses[j] - losses[i]) / (j - i) for i in range(60, 90) for j in range(i + 1, 90))
    level = float(numpy.median(losses[60:]))
    assert found.first_step == 61
    assert found.median_loss == pytest.approx(level)
    assert found.change == pytest.approx(float(numpy.median(slopes)) * 29 / level)
    # 435 pairs, 1.96 deviations of Kendall's statistic are 109.9: Sen's ranks are 162.6 and 273.4 of 435, from 1.
    assert found.lowest == pytest.approx(slopes[163] * 29 / level, rel=0.02)
    assert found.highest == pytest.approx(slopes[271] * 29 / level, rel=0.02)


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
