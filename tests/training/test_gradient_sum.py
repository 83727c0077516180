"""Gradient reduction: the same bytes on any number of ranks, each pass once, and fair shares."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from thread_ranks import in_threads
from torch import Tensor, nn

from llamatune.ranks import Ranks
from llamatune.shapes.gradient_lanes import LANES, count_lanes, deal_passes, own_lanes
from llamatune.training.gradient_sum import TreeSum, reduce_nodes

SHAPES = ((3, 5), (7,), (2, 2, 2))


def reduced(size: int, tokens: Sequence[int], passes: Sequence[Sequence[Tensor]]) -> list[tuple[list[Tensor], Tensor]]:
    """What each of ``size`` ranks holds after the reduction; the facts mark each pass that it computed."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    dealt = deal_passes(tokens, count_lanes(size))

    def work(ranks: Ranks) -> tuple[list[Tensor], Tensor]:
        tree, facts = TreeSum(), torch.zeros(len(tokens), dtype=torch.float64)
        for lane in own_lanes(ranks.rank, size, len(dealt)):
            gradients = None
            for index in dealt[lane]:
                facts[index] += index + 0.1
                if gradients is None:
                    gradients = [tensor.clone() for tensor in passes[index]]
                else:
                    torch._foreach_add_(gradients, list(passes[index]))
            tree.add(lane, 1, gradients)
        if size == 1:
            assert tree.total is not None
            return tree.total, facts
        return reduce_nodes(tree, parameters, facts, dealt, ranks)

    return in_threads(size, work)


@pytest.fixture(params=[1, 2, 3, 5, 8, 13, 40])
def window(request: pytest.FixtureRequest) -> tuple[list[int], list[list[Tensor]]]:
    chance, torch_chance = random.Random(request.param), torch.Generator().manual_seed(request.param)
    tokens = [chance.randint(1, 500) for _ in range(request.param)]

    def gradient(shape: tuple[int, ...]) -> Tensor:  # of magnitudes that differ, so that the order matters
        return torch.randn(shape, generator=torch_chance) * 10 ** chance.uniform(-4, 4)

    return tokens, [[gradient(shape) for shape in SHAPES] for _ in tokens]


@pytest.mark.parametrize("size", range(2, 9))
def test_any_number_of_ranks_gives_the_bytes_of_one(window: Any, size: int) -> None:
    tokens, passes = window
    ((alone, _),) = reduced(1, tokens, passes)
    for gradients, facts in reduced(size, tokens, passes):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, alone, strict=True))
        assert facts.tolist() == [index + 0.1 for index in range(len(tokens))]


def test_the_sum_is_right(window: Any) -> None:
    tokens, passes = window
    for size in (1, 3, 8, 16):
        for total, column in zip(reduced(size, tokens, passes)[0][0], zip(*passes, strict=True), strict=True):
            exact = torch.stack([tensor.double() for tensor in column]).sum(0)
            largest = torch.stack(column).abs().max()
            assert torch.allclose(total.double(), exact, rtol=0, atol=1e-5 * float(largest))


def test_another_order_gives_other_bytes() -> None:
    """The control: summing rank by rank, as an all-reduce would, is seen by the comparison above."""
    chance = torch.Generator().manual_seed(0)
    passes = [[torch.randn(1000, generator=chance)] for _ in range(8)]
    in_order = passes[0][0].clone()
    for (tensor,) in passes[1:]:
        in_order += tensor
    tree = TreeSum()
    for lane, (tensor,) in enumerate(passes):
        tree.add(lane, 1, [tensor.clone()])
    assert tree.total is not None
    assert not torch.equal(tree.total[0], in_order)


def test_few_partial_sums_are_held() -> None:
    tree, most = TreeSum(), 0
    for lane in range(LANES):
        tree.add(lane, 1, [torch.ones(1)])
        most = max(most, len(tree.nodes))
    assert most == 3


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 30, 100])
def test_every_pass_is_dealt_once_and_shares_are_fair(count: int) -> None:
    chance = random.Random(count)
    for _ in range(20):
        tokens = [chance.randint(1, 600) for _ in range(count)]
        dealt = deal_passes(tokens, LANES)
        assert sorted(itertools.chain(*dealt)) == list(range(count))
        assert all(lane == sorted(lane) for lane in dealt)
        for size in (2, 4, 8):
            shares = [
                sum(tokens[index] for lane in own_lanes(rank, size, LANES) for index in dealt[lane])
                for rank in range(size)
            ]
            # Longest first: at each of the halvings one side exceeds the other by at most the longest pass.
            assert max(shares) <= sum(tokens) / size + 2 * max(tokens)


@pytest.mark.parametrize(("ranks", "lanes"), [(1, 8), (3, 8), (8, 8), (9, 16), (16, 16), (17, 32)])
def test_lanes_of_many_ranks(ranks: int, lanes: int) -> None:
    assert count_lanes(ranks) == lanes
    owned = [own_lanes(rank, ranks, lanes) for rank in range(ranks)]
    assert list(itertools.chain(*owned)) == list(range(lanes))
    assert min(map(len, owned)) >= 1
