"""The choice of a learning rate: which rates are tried before a run, and which one their losses favour. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

BUDGET = 64
"""Micro-batches that a search computes at most."""
UPDATES, HELD_OUT = 6, 2
"""Micro-batches that a trial trains on, an update each, and those that it is measured on after that."""
MEASURED = 3
"""The last micro-batches of training that a trial is measured on too, each before the update on it."""
STEP = math.sqrt(10)
"""Between neighbouring rates of the first trials."""
FACTORS = (1 / 3, 1.0)
"""Bounds of ``run_factor``."""


@dataclass(frozen=True)
class Choice:
    """``trial_rate`` is the best of the trials, ``rate`` the one for the run."""

    trial_rate: float
    rate: float
    method: str


def prior_rate(hidden_size: int, lora: bool) -> float:
    """Where the trials begin: what sweeps of tinker-cookbook fitted for LLaMA models, by their hidden size.

    5e-5, times 10 for LoRA, times (2000 / hidden size)^0.781 (docs/learning-rate.md).
    """
    return 5e-5 * (10 if lora else 1) * math.pow(2000 / hidden_size, 0.781)


def run_factor(total_steps: int, micro_batches: int, updates: int) -> float:
    """The best rate of a run over the best one of a trial: sqrt(micro-batches of a window * K / N), within bounds.

    A window of several micro-batches has less noise than a trial's single ones, and takes larger steps, by the square
    root (Malladi et al. 2022). N updates need smaller steps than the K of a trial, down to a rate that no longer falls
    with N: that of LoRA is a third lower in long runs than below 100 updates (Schulman et al. 2025).
    """
    factor = math.sqrt(micro_batches * updates / total_steps)
    return min(max(factor, FACTORS[0]), FACTORS[1])


@dataclass
class Bracket:
    """Trials at neighbouring points of a logarithmic axis, until the lowest loss has one on both sides, then between.

    ``measure`` gives the loss at a rate, None where it diverged; at most ``most`` rates are measured.
    """

    measure: Callable[[float], float | None]
    most: int
    losses: dict[float, float] = field(default_factory=dict)

    def loss(self, rate: float) -> float:
        if rate not in self.losses:
            measured = self.measure(rate)
            self.losses[rate] = math.inf if measured is None else measured
        return self.losses[rate]

    def search(self, first: float) -> float:
        """The rate of the lowest loss, by a parabola through the best trial and its neighbours."""
        for rate in (first, first * STEP, first / STEP)[: self.most]:
            self.loss(rate)
        while len(self.losses) < self.most - 2 and (further := self._outside()) is not None:
            self.loss(further)
        while len(self.losses) < self.most and (between := self._between()) is not None:
            self.loss(between)
        return self._by_parabola()

    @property
    def best(self) -> float:
        """The lower of two rates with the same loss."""
        return min(self.losses, key=lambda rate: (self.losses[rate], rate))

    def _outside(self) -> float | None:
        """The next point beyond the best, if that is the last on its side."""
        if self.best == max(self.losses):
            return self.best * STEP
        return self.best / STEP if self.best == min(self.losses) else None

    def _between(self) -> float | None:
        """A point half a step from the best, on a side where none is that near."""
        half = math.sqrt(STEP)
        for rate in (self.best * half, self.best / half):
            if not any(math.isclose(rate, known, rel_tol=1e-6) for known in self.losses):
                return rate
        return None

    def _by_parabola(self) -> float:
        rates = sorted(self.losses)
        place = rates.index(self.best)
        near = rates[max(0, place - 1) : place + 2]
        if len(near) < 3 or not all(math.isfinite(self.losses[rate]) for rate in near):
            return self.best
        (a, b, c), (fa, fb, fc) = map(math.log, near), (self.losses[rate] for rate in near)
        below, above = (b - a) * (fb - fc), (b - c) * (fb - fa)
        if below == above:
            return self.best
        lowest = b - 0.5 * ((b - a) * below - (b - c) * above) / (below - above)
        return math.exp(min(max(lowest, a), c))


def choose_rate(
    measure: Callable[[float], float | None], prior: float, lowest: float, factor: float, most: int
) -> Choice:
    """Try at most ``most`` rates around ``prior``; the one for a run whose ``run_factor`` is ``factor``.

    It is not below ``lowest``, and has three digits.
    """
    found = Bracket(measure, most).search(prior / factor)
    method = f"trials around {prior / factor:.2g}, times {factor:.2g}"
    return Choice(found, max(lowest, float(f"{found * factor:.3g}")), method)
