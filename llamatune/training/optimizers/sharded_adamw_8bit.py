"""8-bit AdamW on slices of parameters: the blocks are those of the whole tensors, whatever the number of ranks.

A slice may begin and end inside a block. The two ranks that share a block both keep its state; they send each other
the gradients of its elements, and each updates the weights that it has.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llamatune.model.blockwise_8bit import BLOCK
from llamatune.ranks import ALONE, Ranks
from llamatune.shapes.parameter_shards import Shard
from llamatune.training.optimizers.adamw_8bit import SMALLEST_QUANTIZED, AdamW8bit, Run, zero_state
from llamatune.training.optimizers.optimizer import State

_EDGE = BLOCK - 1
"""At most so many elements of a shared block are on other ranks, before a slice and behind it."""


@dataclass(frozen=True)
class ShardedAdamW8bit(AdamW8bit):
    """``shards`` say which part of its parameter each slice is.

    State as that of ``AdamW8bit``, of all blocks of which a slice has an element; of a small tensor, of its elements.
    """

    shards: Mapping[Tensor, Shard] = field(default_factory=dict)
    ranks: Ranks = ALONE

    def fresh_state(self, parameter: Tensor) -> State:
        shard = self.shards[parameter]
        large = shard.whole >= SMALLEST_QUANTIZED
        count = len(shard.held_blocks(BLOCK)) * BLOCK if large else len(shard)
        return zero_state(count, large, parameter.device)

    def update(self, weights: list[Tensor], grads: list[Tensor], states: list[State], learning_rate: float) -> None:
        alike: dict[tuple[bool, int], list[_Run]] = defaultdict(list)
        edges = iter(self._edges([(self.shards[w], g) for w, g in zip(weights, grads, strict=True)]))
        for weight, grad, state in zip(weights, grads, states, strict=True):
            shard, flat = self.shards[weight], grad.reshape(-1)
            state["step"] += 1
            large, step = shard.whole >= SMALLEST_QUANTIZED, int(state["step"])
            if large:
                alike[large, step] += _runs(weight.view(-1), flat, state, shard, *next(edges))
            else:
                alike[large, step].append(_Run(weight.view(-1), flat, state))
        self.update_runs(alike, learning_rate)
        for run in itertools.chain.from_iterable(alike.values()):
            if run.copied_into is not None:
                run.copied_into.copy_(run.weights[run.offset :][: len(run.copied_into)])

    def _edges(self, slices: Sequence[tuple[Shard, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each large tensor the gradients of the elements before and behind the slice that share a block with it.

        One message for all tensors.
        """
        large = [(shard, grad.reshape(-1)) for shard, grad in slices if shard.whole >= SMALLEST_QUANTIZED]
        if not large:
            return
        sent = large[0][1].new_zeros(len(large), 2, _EDGE)
        for (first, last), (_, grad) in zip(sent, large, strict=True):
            first[: len(grad)] = grad[:_EDGE]
            last[max(0, _EDGE - len(grad)) :] = grad[-_EDGE:]
        received = self.ranks.all_gather(sent)  # (ranks, tensors, 2, _EDGE)
        for index, (shard, _) in enumerate(large):
            held, none = shard.held_blocks(BLOCK), sent.new_empty(0)
            if not held:
                yield none, none
                continue
            before, behind = shard.begin - held.start * BLOCK, min(held.stop * BLOCK, shard.whole) - shard.end
            left, right, rank = none, none, shard.rank
            while len(left) < before:
                rank -= 1
                there = min(_EDGE, len(shard.on(rank)))
                left = torch.cat((received[rank, index, 1, _EDGE - there :], left))
            rank = shard.rank
            while len(right) < behind:
                rank += 1
                right = torch.cat((right, received[rank, index, 0, : len(shard.on(rank))]))
            yield left[len(left) - before :], right[:behind]


@dataclass(frozen=True)
class _Run(Run):
    """``weights`` are a view of the slice, or a copy of which the part from ``offset`` on goes to ``copied_into``."""

    copied_into: Tensor | None = None
    offset: int = 0


def _runs(weight: Tensor, grad: Tensor, state: State, shard: Shard, left: Tensor, right: Tensor) -> Iterator[_Run]:
    """A slice, cut behind the block that it shares with the ranks before it, and before that of those behind it."""
    begin, end = shard.begin, shard.end
    inner = min(-(-begin // BLOCK) * BLOCK, end)
    outer = end if end == shard.whole else max(end // BLOCK * BLOCK, inner)
    for first, last in itertools.pairwise((begin, inner, outer, end)):
        if first == last:
            continue
        here = slice(first - begin, last - begin)
        block, stop = first // BLOCK, -(-last // BLOCK)
        views = _state_of_blocks(state, block - begin // BLOCK, stop - begin // BLOCK)
        before, behind = first - block * BLOCK, min(stop * BLOCK, shard.whole) - last
        if not before and not behind:
            yield _Run(weight[here], grad[here], views)
            continue
        joined = torch.cat((left[:before], grad[here], right[:behind]))
        copy = torch.zeros_like(joined, dtype=weight.dtype)
        copy[before : before + last - first] = weight[here]
        yield _Run(copy, joined, views, weight[here], before)


def _state_of_blocks(state: State, first: int, last: int) -> State:
    blocks, elements = slice(first, last), slice(first * BLOCK, last * BLOCK)
    return {
        key: tensor if key == "step" else tensor[blocks if key.endswith("_largest") else elements]
        for key, tensor in state.items()
    }
