"""Work shared over ranks: each computes some of the items, and all receive every result in the items' order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from llamatune.errors import EnvironmentFault, Stopped
from llamatune.events import ShouldStop
from llamatune.ranks import Ranks

T = TypeVar("T")
R = TypeVar("R")

_ITEMS_IN_A_ROUND = 8
"""Of each rank between two exchanges: items differ in size, and a round takes as long as its slowest rank."""

_TURNS_IN_A_ROUND, _GENERATED_IN_A_ROUND = 4, 64
"""Of each place of a rank that generates side by side, since a free place waits for the others at the round's end; and
the most items that a rank has in turns: what was generated is kept at the round's end.
"""


def refuse_differences(own: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise where a rank, perhaps on another node, has other values (JSON) of the same names than the first."""
    found = ranks.gather(own)
    for rank, other in enumerate(found):
        if different := [name for name in found[0] if other[name] != found[0][name]]:
            what = f"rank {rank} has another {' and another '.join(different)} than rank 0"
            raise EnvironmentFault(what, None, "every node must see the same files and packages")


def shared_map(
    items: Iterable[T],
    work: Callable[[T], R],
    should_stop: ShouldStop,
    ranks: Ranks,
    idle: Callable[[], None] | None = None,
    items_in_a_round: int = _ITEMS_IN_A_ROUND,
) -> Iterator[R]:
    """``work`` of each item, in order. With several ranks a result must be JSON, and comes back as JSON gives it.

    ``idle`` is called in place of ``work`` on a rank that has fewer items than the others. ``items_in_a_round``: of
    each rank between two exchanges; what is kept after each exchange takes 1.

    Raises:
        Stopped: ``should_stop`` asked for it, on any rank.
    """
    if ranks.size == 1:
        for item in items:
            _check(should_stop())
            yield work(item)
        return
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, ranks.size * items_in_a_round)):
        own = [work(item) for item in batch[ranks.rank :: ranks.size]]
        if idle is not None and len(own) < -(-len(batch) // ranks.size):
            idle()
        answers = ranks.gather((should_stop(), own))
        _check(any(asked for asked, _ in answers))
        for place in range(len(batch)):
            yield answers[place % ranks.size][1][place // ranks.size]


def share_generating(
    items: Sequence[T],
    work: Callable[[Sequence[T], ShouldStop], Iterator[R]],
    at_once: int,
    should_stop: ShouldStop,
    ranks: Ranks,
    in_slices: bool,
) -> Iterator[R]:
    """A result of each item, in order, from ``work``, which generates tokens until what it gets asks for its end.

    Ranks share the items, and results must be JSON; a rank works on ``at_once`` items side by side. Where ranks hold
    the weights ``in_slices``, each computes all items, since each token takes all of the weights, and they agree on a
    stop at each token.

    Raises:
        Stopped: ``should_stop`` asked for it, on any rank.
    """
    if in_slices or ranks.size == 1:
        yield from work(items, (lambda: ranks.any(should_stop())) if in_slices else should_stop)
        return
    in_a_round = max(at_once, min(at_once * _TURNS_IN_A_ROUND, _GENERATED_IN_A_ROUND))
    rounds = -(-len(items) // (ranks.size * in_a_round))
    together = max(1, -(-len(items) // (ranks.size * max(1, rounds))))
    parts = [items[first : first + together] for first in range(0, len(items), together)]
    for results in shared_map(
        parts, lambda part: list(work(part, should_stop)), should_stop, ranks, items_in_a_round=1
    ):
        yield from results


def _check(asked: bool) -> None:
    if asked:
        raise Stopped("stopped by a signal")
