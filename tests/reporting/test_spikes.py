"""Spikes on curves with known answers, with noise; none where there is none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from report_material import falling, make_steps, noisy, write_run

from llamatune.reporting.diagnosis import diagnose, diagnose_run
from llamatune.reporting.report_text import findings
from llamatune.reporting.run_reader import read_run
from llamatune.reporting.spikes import find_spikes

SMOOTH = {
    "exponential": falling(400),
    "steep": [1 + 9 * math.exp(-place / 8) for place in range(400)],
    "linear": [3 - place / 200 for place in range(400)],
    "constant": [2.0] * 400,
    "slow rise": [1 + place / 400 for place in range(400)],
    "stairs of epochs": [[2.0, 1.2, 0.7, 0.4][place // 100] for place in range(400)],
    "to nothing": [math.exp(-place / 40) for place in range(400)],
}


@pytest.mark.parametrize("deviation", [0.0, 0.02, 0.15, 0.4])
@pytest.mark.parametrize("shape", SMOOTH)
def test_no_spike_is_found_where_there_is_none(shape: str, deviation: float) -> None:
    for seed in range(3):
        assert find_spikes(make_steps(noisy(SMOOTH[shape], deviation, seed))) == []


@pytest.mark.parametrize("deviation", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("place", [40, 150, 399])
def test_a_spike_is_found_at_its_step_with_its_norm_and_rate(place: int, deviation: float) -> None:
    losses = noisy(falling(400), deviation, seed=place)
    losses[place] *= 5
    steps = make_steps(losses)
    (spike,) = find_spikes(steps)
    planted = steps[place]
    assert (spike.step, spike.window, spike.loss) == (planted.step, planted.window, planted.loss)
    assert (spike.grad_norm, spike.learning_rate) == (planted.grad_norm, planted.learning_rate)
    assert (spike.first_step, spike.last_step) == (place + 1, place + 1)
    assert spike.epoch == math.ceil(planted.epoch)
    assert spike.typical_loss == pytest.approx(falling(400)[place], rel=0.1 + deviation)
    assert spike.typical_grad_norm == pytest.approx(10 * spike.typical_loss)
    assert spike.recovered == (place < 399)


def test_neighbouring_high_losses_are_one_spike_told_by_its_peak() -> None:
    losses = noisy(falling(300), 0.05)
    for place, factor in zip(range(200, 206), (3, 5, 9, 1, 4, 3), strict=True):
        losses[place] *= factor
    (spike,) = find_spikes(make_steps(losses))
    assert (spike.first_step, spike.step, spike.last_step) == (201, 203, 206)
    assert spike.recovered


def test_two_spikes_are_two_even_within_one_window() -> None:
    losses = noisy(falling(300), 0.05)
    losses[200] *= 6
    losses[215] *= 4
    assert [spike.step for spike in find_spikes(make_steps(losses))] == [201, 216]


def test_a_loss_that_never_comes_back_is_a_spike_without_end() -> None:
    losses = noisy([*falling(200), *[8.0] * 60], 0.05)
    (spike,) = find_spikes(make_steps(losses))
    assert (spike.first_step, spike.last_step, spike.recovered) == (201, 260, False)
    assert "never came back" in findings(diagnose(make_steps(losses), []))[1]


SURGE = [15.6, 7.23, 5.17, 6.61, 4.81, 3.61, 13.62, 9.46, 6.96, 4.48, 3.4, 4.04, 3.74, 2.69, 2.86, 2.27]
SURGE += [2.54, 2.68, 2.06, 2.12, 2.14, 3.03, 2.81, 2.83, 2.42, 2.34, 2.43, 2.17, 2.35, 2.51, 2.88, 1.98]
"""A run of AdamW at a rate of 0.019 without warm-up."""


def test_a_rise_within_the_first_twenty_steps_is_told_with_its_end_and_cause(tmp_path: Path) -> None:
    found = diagnose_run(read_run(write_run(tmp_path / "run", SURGE), "run"))
    (spike,) = found.spikes
    assert (spike.early, spike.first_step, spike.step, spike.last_step, spike.recovered) == (True, 7, 7, 9, True)
    assert (spike.typical_loss, spike.loss, spike.typical_grad_norm) == (3.61, 13.62, pytest.approx(51.7))
    text = findings(found)[1]
    assert "rose within the first twenty steps: from 3.6100 to 13.6200 at step 7, 3.8 times as high; over after" in text
    assert "over after step 9. Likely cause: the learning rate is too high" in text
    assert "it lasted 3 updates" in text
    assert "there is no warm-up; 100% of the updates were clipped to 1)" in text
    assert text.endswith("No spikes of the training loss after the first twenty steps.")
    warmed = write_run(tmp_path / "warmed", SURGE, training__warmup_steps=5)
    assert "warm-up;" not in findings(diagnose_run(read_run(warmed, "run")))[1].replace("a longer warm-up", "")


def test_an_early_rise_of_one_window_is_its_rows_and_a_later_spike_is_told_too(tmp_path: Path) -> None:
    losses = noisy(falling(200), 0.05)
    losses[8] *= 4
    losses[120] *= 6
    found = diagnose_run(read_run(write_run(tmp_path / "run", losses), "run"))
    assert [(spike.step, spike.early, spike.cause and spike.cause.kind) for spike in found.spikes] == [
        (9, True, "rows"), (121, False, "rows"),
    ]  # fmt: skip
    text = findings(found)[1]
    assert "at step 9" in text
    assert "1 spike of the training loss, the worst at step 121" in text


def test_an_early_rise_that_stays_never_came_back_and_its_cause_is_told_once(tmp_path: Path) -> None:
    found = diagnose_run(read_run(write_run(tmp_path / "run", noisy([3.0, 2.5, 2.2, *[9.0] * 40], 0.03)), "run"))
    (spike,) = found.spikes
    assert (spike.early, spike.recovered) == (True, False)
    course, rise = findings(found)[:2]
    assert course.startswith("Diverged: ")
    assert (course.count("Likely cause"), rise.count("Likely cause")) == (1, 0)
    assert rise.endswith("; it never came back.")


@pytest.mark.parametrize("count", [12, 32, 200])
@pytest.mark.parametrize("deviation", [0.05, 0.2, 0.5])
def test_the_noise_of_a_beginning_is_no_rise(count: int, deviation: float) -> None:
    """Of 200 runs: levels, a steep start, an exponential and a linear fall."""
    shapes = (
        [2.0] * count, [1 + 9 * math.exp(-place / 8) for place in range(count)], falling(count),
        [3 - 2 * place / count for place in range(count)],
    )  # fmt: skip
    alarms = sum(
        any(spike.early for spike in find_spikes(make_steps(noisy(shape, deviation, seed))))
        for shape in shapes
        for seed in range(50)
    )
    assert alarms <= 4
