"""Passes: the forward and backward passes of an accumulation window, its micro-batches joined up to a number of tokens.

``memory.planned_run`` decides that number.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from llamatune.formats.origin_json import Passes
from llamatune.shapes.gradient_lanes import LANES


@dataclass(frozen=True)
class PassRule:
    """How a run joins micro-batches, and in what order it sums gradients; chosen at its start, the same to its end.

    ``tokens``: a pass of several micro-batches has at most so many; None: each micro-batch is a pass. ``at_least``: the
    passes of a window, where it has so many micro-batches. ``lanes`` are those of ``shapes.gradient_lanes``; None adds
    the gradients one after another.
    """

    tokens: int | None = None
    at_least: int = 1
    lanes: int | None = LANES

    @classmethod
    def restored(cls, saved: Passes | None) -> PassRule:
        """From ``origin.json``. Runs of versions that had no passes continue in their order of addition."""
        return cls(lanes=None) if saved is None else cls(saved.tokens, saved.at_least, saved.lanes)


SINGLE_MICRO_BATCHES = PassRule()
"""Each micro-batch is a pass."""


def join_micro_batches(sizes: Sequence[int], rule: PassRule) -> list[list[int]]:
    """The micro-batches (by index into ``sizes``, their tokens) of each pass, both in order.

    As few passes as the rule allows, of nearly equal tokens: longest first, each to the lightest pass.
    """
    if rule.tokens is None:
        return [[index] for index in range(len(sizes))]
    longest_first = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    fewest = max(-(-sum(sizes) // rule.tokens), rule.at_least)
    for count in range(min(fewest, len(sizes)), len(sizes) + 1):
        passes: list[tuple[int, int, list[int]]] = [(0, place, []) for place in range(count)]  # a heap by tokens
        for index in longest_first:
            tokens, place, joined = passes[0]
            joined.append(index)
            heapq.heapreplace(passes, (tokens + sizes[index], place, joined))
        if all(tokens <= rule.tokens or len(joined) == 1 for tokens, _, joined in passes):
            break
    return sorted(sorted(joined) for _, _, joined in passes)
