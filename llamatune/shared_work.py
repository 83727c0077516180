"""Work shared over ranks: each computes some of the items, and all receive every result in the items' order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from llamatune.errors import Stopped
from llamatune.events import ShouldStop
from llamatune.ranks import Ranks

T = TypeVar("T")
R = TypeVar("R")

_ITEMS_IN_A_ROUND = 8
"""Of each rank between two exchanges: items differ in size, and a round takes as long as its slowest rank."""


def shared_map(
    items: Iterable[T],
    work: Callable[[T], R],
    should_stop: ShouldStop,
    ranks: Ranks,
    idle: Callable[[], None] | None = None,
) -> Iterator[R]:
    """``work`` of each item, in order. With several ranks a result must be JSON, and comes back as JSON gives it.

    ``idle`` is called in place of ``work`` on a rank that has fewer items than the others.

    Raises:
        Stopped: ``should_stop`` asked for it, on any rank.
    """
    if ranks.size == 1:
        for item in items:
            _check(should_stop())
            yield work(item)
        return
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, ranks.size * _ITEMS_IN_A_ROUND)):
        own = [work(item) for item in batch[ranks.rank :: ranks.size]]
        if idle is not None and len(own) < -(-len(batch) // ranks.size):
            idle()
        answers = ranks.gather((should_stop(), own))
        _check(any(asked for asked, _ in answers))
        for place in range(len(batch)):
            yield answers[place % ranks.size][1][place // ranks.size]


def _check(asked: bool) -> None:
    if asked:
        raise Stopped("stopped during evaluation")
