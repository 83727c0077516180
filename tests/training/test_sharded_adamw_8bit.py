"""8-bit AdamW on slices: the blocks, and so the bytes, are those of whole tensors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from thread_ranks import in_threads
from torch import Tensor, nn

from llamatune.model.blockwise_8bit import BLOCK
from llamatune.model.kernels import choice
from llamatune.ranks import Ranks
from llamatune.shapes.parameter_shards import Shard
from llamatune.training.optimizers.adamw_8bit import AdamW8bit
from llamatune.training.optimizers.optimizer import Optimizer
from llamatune.training.optimizers.sharded_adamw_8bit import ShardedAdamW8bit

SHAPES = [(64, 128), (33, 200), (5000,), (12, 40), (70, 61), (3, 5001), (32,)]
HYPER = (0.9, 0.99), 1e-8, 0.05


def drawn(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 10.0 ** (step % 3) for shape in SHAPES]


def trained_whole(steps: int) -> Optimizer:
    parameters = {str(index): nn.Parameter(tensor) for index, tensor in enumerate(drawn(0))}
    optimizer = Optimizer(parameters, AdamW8bit(*HYPER))
    for step in range(1, steps + 1):
        for parameter, grad in zip(parameters.values(), drawn(step), strict=True):
            parameter.grad = grad
        optimizer.step(0.01)
    return optimizer


@pytest.fixture
def interpreted_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's kernel in place of the plain update; the interpreter runs one at a time."""
    pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")
    kernel, alone = choice._kernel("adamw_8bit", "update_quantized"), threading.Lock()
    monkeypatch.setattr("llamatune.model.kernels.adamw_8bit._BLOCKS_AT_ONCE", 64)  # few programs: they are slow here

    def run_alone(*args: Any) -> None:
        with alone:
            kernel(*args)

    monkeypatch.setattr(choice, "_kernel", lambda file, name: run_alone)
    with choice.running_kernels("cpu"):
        yield


@pytest.mark.usefixtures("interpreted_kernels")
@pytest.mark.parametrize("size", [3])
def test_so_they_are_by_the_kernel(size: int) -> None:
    test_slices_are_updated_as_the_whole(size)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16, 40])
def test_slices_are_updated_as_the_whole(size: int) -> None:
    """Of 40 ranks several share one block, and some have no row."""
    expected = trained_whole(4)

    def work(ranks: Ranks) -> Optimizer:
        shards = [Shard.of(shape, ranks.rank, size) for shape in SHAPES]
        own = [tensor.view(-1)[s.begin : s.end].clone() for tensor, s in zip(drawn(0), shards, strict=True)]
        parameters = {str(index): nn.Parameter(tensor) for index, tensor in enumerate(own)}
        optimizer = Optimizer(
            parameters, ShardedAdamW8bit(*HYPER, dict(zip(parameters.values(), shards, strict=True)), ranks)
        )
        for step in range(1, 5):
            for parameter, grad, shard in zip(parameters.values(), drawn(step), shards, strict=True):
                parameter.grad = grad.view(-1)[shard.begin : shard.end].clone()
            optimizer.step(0.01)
        return optimizer

    found = in_threads(size, work)
    for index, shape in enumerate(SHAPES):
        name, shards = str(index), [Shard.of(shape, rank, size) for rank in range(size)]
        weights = torch.cat([optimizer.parameters[name].detach() for optimizer in found])
        torch.testing.assert_close(weights, expected.parameters[name].detach().view(-1), rtol=1e-6, atol=1e-7)
        whole = expected.state[name]
        for optimizer, shard in zip(found, shards, strict=True):
            state = optimizer.state[name]
            assert state.keys() == whole.keys()
            if "exp_avg_largest" in whole:
                held = shard.held_blocks(BLOCK)
                cut = slice(held.start * BLOCK, held.stop * BLOCK)
                assert torch.equal(state["exp_avg"], whole["exp_avg"][cut])
                assert torch.equal(state["exp_avg_sq_largest"], whole["exp_avg_sq_largest"][held.start : held.stop])
            else:
                torch.testing.assert_close(state["exp_avg"], whole["exp_avg"][shard.begin : shard.end])
        owned = [block for shard in shards for block in shard.owned_blocks(BLOCK)]
        assert owned == list(range(-(-shards[0].whole // BLOCK)))
