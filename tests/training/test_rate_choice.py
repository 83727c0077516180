"""The choice of a learning rate from losses of trials: closed forms, walls, budgets."""

from __future__ import annotations

import math

import pytest

from llamatune.training.rate_choice import FACTORS, STEP, Bracket, choose_rate, prior_rate, run_factor


def test_a_parabola_is_found_exactly_wherever_the_search_begins() -> None:
    """A loss that is a parabola of log rate has its lowest point at 3.3e-4."""
    for first in (1e-4, 2.9e-4, 1e-3, 3e-3):
        bracket = Bracket(lambda rate: 1.5 + 0.2 * math.log(rate / 3.3e-4) ** 2, 7)
        assert bracket.search(first) == pytest.approx(3.3e-4, rel=1e-6)
        assert len(bracket.losses) <= 7


@pytest.mark.parametrize("most", [1, 2, 3, 5, 7])
def test_no_more_rates_are_tried_than_allowed_and_none_twice(most: int) -> None:
    tried: list[float] = []

    def measure(rate: float) -> float:
        tried.append(rate)
        return abs(math.log(rate / 0.9))

    Bracket(measure, most).search(1e-3)
    assert len(tried) == most == len({round(math.log10(rate), 6) for rate in tried})


def test_diverged_trials_bound_the_search_from_above() -> None:
    """Above 2e-3 nothing is finite, and below it the loss falls with the rate."""
    bracket = Bracket(lambda rate: None if rate > 2e-3 else 3 - math.log(rate / 1e-6) / 9, 7)
    found = bracket.search(1e-2)
    assert found <= 2e-3
    assert found == max(rate for rate, loss in bracket.losses.items() if math.isfinite(loss))


def test_of_equal_losses_the_lower_rate_is_taken() -> None:
    assert Bracket(lambda rate: 1.0, 3).search(1e-3) == pytest.approx(1e-3 / STEP)


def test_everything_diverging_leaves_the_lowest_rate() -> None:
    bracket = Bracket(lambda rate: None, 4)
    assert bracket.search(1.0) == min(bracket.losses)


def test_the_rate_of_the_run_is_not_below_the_spec_s_lowest() -> None:
    chosen = choose_rate(lambda rate: abs(math.log(rate / 1e-4)), 1e-4, 5e-3, 1.0, 7)
    assert chosen.rate == 5e-3
    assert chosen.trial_rate == pytest.approx(1e-4, rel=0.2)


def test_the_factor_follows_window_and_length_within_its_bounds() -> None:
    assert run_factor(48, 8, 6) == 1
    assert run_factor(12, 2, 6) == 1
    assert run_factor(10, 4, 6) == 1
    assert run_factor(1, 64, 6) == FACTORS[1]
    assert run_factor(100_000, 1, 6) == FACTORS[0]
    assert run_factor(4 * 48, 8, 6) == pytest.approx(0.5)


def test_the_prior_is_the_formula_of_the_sweeps() -> None:
    """Llama-3.1-8B, whose hidden size is 4,096, by the formula of tinker-cookbook: 2.86e-4."""
    assert prior_rate(4096, lora=True) == pytest.approx(2.857e-4, rel=1e-3)
    assert prior_rate(4096, lora=False) == pytest.approx(prior_rate(4096, lora=True) / 10)
