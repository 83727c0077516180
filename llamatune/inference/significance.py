"""Statistical significance: confidence intervals and McNemar's test, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

_Z = NormalDist().inv_cdf(0.975)
"""Standard errors on either side of a 95 % interval."""

Interval = tuple[float, float]


def score_interval(right: int, n: int) -> Interval:
    """Wilson's 95 % interval of ``right`` of ``n`` (Wilson 1927), which is within 0 and 1 and holds for a small n."""
    p, shrink = right / n, 1 + _Z**2 / n
    centre = (p + _Z**2 / (2 * n)) / shrink
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / shrink
    # Where all or none is right the bound is exactly 1 or 0, and rounding must not move it.
    return 0.0 if right == 0 else centre - half, 1.0 if right == n else centre + half


def exact_mcnemar(one_alone: int, other_alone: int) -> float:
    """The two-sided p-value of McNemar's exact test (McNemar 1947).

    Of two models that answered the same questions, each alone was right on so many. Under the null hypothesis each of
    those questions goes to either model with probability 1/2.
    """
    n, fewer = one_alone + other_alone, min(one_alone, other_alone)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / (1 << n))


def paired_difference_interval(gained: int, lost: int, n: int) -> Interval:
    """95 % interval of (gained - lost) / n, the difference of two shares of the same ``n`` questions.

    Wald's with half a question added to each of the four outcomes (Agresti and Min 2005), so that it does not shrink to
    a point where nothing was gained or lost.
    """
    difference = (gained - lost) / (n + 2)
    half = _Z * math.sqrt(((gained + lost + 1) / (n + 2) - difference**2) / (n + 2))
    return max(-1.0, difference - half), min(1.0, difference + half)


def ratio_interval(sums: Sequence[float], weights: Sequence[int]) -> Interval | None:
    """95 % interval of sum(sums) / sum(weights) over rows drawn independently; None for a single row.

    A row's tokens are not independent, so the row is the unit: the linearised variance of a ratio estimator (Cochran
    1977, ch. 6), sum((s - ratio w)²) m / (m - 1) / sum(w)².
    """
    m, total = len(sums), sum(weights)
    if m < 2:
        return None
    ratio = math.fsum(sums) / total
    squares = math.fsum((s - ratio * w) ** 2 for s, w in zip(sums, weights, strict=True))
    half = _Z * math.sqrt(squares * m / (m - 1)) / total
    return ratio - half, ratio + half
