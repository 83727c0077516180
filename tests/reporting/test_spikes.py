"""Spikes on curves with known answers, with noise; none where there is none."""

from __future__ import annotations

import math

import pytest
from report_material import falling, make_steps, noisy

from llamatune.reporting.diagnosis import diagnose
from llamatune.reporting.report_text import findings
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
