"""The noise of losses and gradient norms from update to update: robust deviations of their logarithms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import median

_DEVIATIONS_PER_MAD = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""
MEDIAN_NOISE = math.sqrt(math.pi / 2)
"""Deviation of a median, in deviations of the mean of as many normal values."""
_LEAST = 1e-9
"""A loss may be zero, and its logarithm is not."""


def robust_deviation(values: Sequence[float], centre: float) -> float:
    """The standard deviation of ``values`` by their median distance from ``centre``, which outliers do not change."""
    return _DEVIATIONS_PER_MAD * median(abs(value - centre) for value in values)


def logarithms(values: Sequence[float]) -> list[float]:
    """Natural logarithms, of a zero that of the least value that counts."""
    return [math.log(max(value, _LEAST)) for value in values]


def noise_of(values: Sequence[float]) -> float:
    """The robust deviation of the logarithm of one value, by differences of neighbours, which a slow change leaves."""
    differences = [after - before for before, after in itertools.pairwise(logarithms(values))]
    return robust_deviation(differences, 0.0) / math.sqrt(2) if differences else 0.0


def factor(rise: float) -> float:
    """How many times larger a value is whose logarithm rose by ``rise``; bounded, for losses that are nearly zero."""
    return math.exp(min(rise, 50.0))
