"""Lanes of the gradient sum: which passes of a window each lane adds, and which lanes each rank computes."""

from __future__ import annotations

from collections.abc import Sequence

LANES = 8
"""Lanes for up to 8 ranks. More ranks take the next power of two, and with it other bytes."""


def count_lanes(ranks: int) -> int:
    """A power of two, at least ``LANES`` and at least one lane a rank."""
    return max(LANES, 1 << (ranks - 1).bit_length())


def deal_passes(tokens: Sequence[int], lanes: int) -> list[list[int]]:
    """The passes (indices into ``tokens``) of each lane: longest first, each to the lighter half of the tree.

    Halves, quarters and so on have nearly equal tokens, so consecutive lanes are fair shares for 2, 4 or 8 ranks.
    """
    dealt: list[list[int]] = [[] for _ in range(lanes)]
    load = [0] * (2 * lanes)  # of the tree's nodes: node n has the children 2n and 2n + 1, the lanes are its leaves
    for index in sorted(range(len(tokens)), key=lambda index: (-tokens[index], index)):
        node = 1
        while node < lanes:
            node = 2 * node + (load[2 * node + 1] < load[2 * node])
            load[node] += tokens[index]
        dealt[node - lanes].append(index)
    return [sorted(lane) for lane in dealt]


def own_lanes(rank: int, ranks: int, lanes: int) -> range:
    """The consecutive lanes that a rank computes."""
    return range(lanes * rank // ranks, lanes * (rank + 1) // ranks)
