"""Passes: the forward and backward passes of an accumulation window, into which its micro-batches are joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.training.gradient_sum import LANES, count_lanes


@dataclass(frozen=True)
class PassRule:
    """How a run joins micro-batches, and in what order it sums gradients; chosen at its start, the same to its end.

    ``tokens``: a pass of several micro-batches has at most so many; None: each micro-batch is a pass. ``at_least``: the
    passes of a window, where it has so many micro-batches. ``lanes``: of ``gradient_sum``; 1 adds the gradients one
    after another.
    """

    tokens: int | None = None
    at_least: int = 1
    lanes: int = LANES

    @classmethod
    def restored(cls, saved: Any, where: object) -> PassRule:
        """From ``origin.json``. Runs of versions that had no passes continue in their order of addition."""
        if saved is None:
            return cls(tokens=None, at_least=1, lanes=1)
        if isinstance(saved, Mapping) and saved.keys() == {"tokens", "at_least", "lanes"}:
            tokens, at_least, lanes = saved["tokens"], saved["at_least"], saved["lanes"]
            counts = (at_least, lanes) if tokens is None else (tokens, at_least, lanes)
            if all(type(count) is int and 1 <= count < 1 << 53 for count in counts) and lanes == lanes & -lanes:
                return cls(tokens, at_least, lanes)
        raise CheckpointError(f"passes is {str(saved)[:80]!r}", where, "was it edited? choose another output_dir")


def join_micro_batches(sizes: Sequence[int], rule: PassRule) -> list[list[int]]:
    """The micro-batches (by index into ``sizes``, their tokens) of each pass, both in order.

    As few passes as the rule allows, of nearly equal tokens: longest first, each to the lightest pass.
    """
    if rule.tokens is None:
        return [[index] for index in range(len(sizes))]
    longest_first = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    fewest = max(-(-sum(sizes) // rule.tokens), rule.at_least)
    for count in range(min(fewest, len(sizes)), len(sizes) + 1):
        passes: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for index in longest_first:
            lightest = loads.index(min(loads))
            passes[lightest].append(index)
            loads[lightest] += sizes[index]
        if all(load <= rule.tokens or len(joined) == 1 for load, joined in zip(loads, passes, strict=True)):
            break
    return sorted(sorted(joined) for joined in passes)
