"""NF4 and 8-bit codes bit for bit on both devices, and the optimizers' updates from equal gradients."""

from __future__ import annotations

import pytest
import torch
from gpu_tools import CPU, relative_error
from torch import nn

from llamatune.model.blockwise_8bit import BLOCK, BlockwiseCode
from llamatune.model.nf4 import NF4Weight
from llamatune.model.packed_weight import Scratch
from llamatune.spec_sections import TrainingSection
from llamatune.training.model_and_optimizer import build_optimizer

pytestmark = pytest.mark.gpu

SHAPES = [(64, 64), (7, 9), (100, 48), (257, 1031), (4096, 1024)]


def matrix(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Weights with outliers, a row of zeros, and values that lie between two levels."""
    W = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    W[0] = 0.0
    W[-1, :2] = torch.tensor([3.0, -1.5])
    return W.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_the_same_to_the_bit(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = matrix(shape, dtype)
    found, wanted = (NF4Weight.quantize(x, Scratch()) for x in (W.to(device), W))
    for (name, ours), (_, theirs) in zip(found.named_buffers(), wanted.named_buffers(), strict=True):
        assert torch.equal(ours.cpu(), theirs), name
    assert torch.equal(found.scales().cpu(), wanted.scales())
    for into in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(found.unpacked(into).cpu(), wanted.unpacked(into)), into


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_8_bit_codes_are_the_same_to_the_bit(device: torch.device, signed: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(64 * BLOCK, generator=generator) * 10 ** (4 * torch.rand(64 * BLOCK, generator=generator) - 6)
    x[:BLOCK] = 0.0
    x = x if signed else x.abs()
    ours, theirs = BlockwiseCode(signed, device), BlockwiseCode(signed, CPU)
    codes, largest = ours.encode(x.to(device))
    wanted = theirs.encode(x)
    assert torch.equal(codes.cpu(), wanted[0])
    assert torch.equal(largest.cpu(), wanted[1])
    assert torch.equal(ours.decode(codes, largest).cpu(), theirs.decode(*wanted))
    every = torch.arange(256, dtype=torch.uint8)
    one = torch.ones(1)
    assert torch.equal(ours.decode(every.to(device), one.to(device)).cpu(), theirs.decode(every, one))


@pytest.mark.parametrize(("optimizer", "allowed"), [("adamw", 1e-5), ("sgd", 1e-5), ("adamw_8bit", 1e-3)])
def test_equal_gradients_give_equal_updates(device: torch.device, optimizer: str, allowed: float) -> None:
    """Within some roundings of fp32; in 8 bits a rounding may also move the code of a few of the 32,768 elements."""
    training = TrainingSection(
        output_dir="none", optimizer=optimizer, weight_decay=0.1, momentum=0.9 if optimizer == "sgd" else 0.0
    )  # type: ignore[arg-type]
    start = torch.randn(128, 256, generator=torch.Generator().manual_seed(4))
    ends = []
    for where in (device, CPU):
        parameter = nn.Parameter(start.to(where, copy=True))
        rule, generator = build_optimizer(training, {"W": parameter}), torch.Generator().manual_seed(5)
        for _ in range(4):
            parameter.grad = torch.randn(start.shape, generator=generator).to(where)
            rule.step(1e-2)
        ends.append(parameter.detach().cpu() - start)
    assert relative_error(*ends) <= allowed
    assert float(ends[1].norm()) > 0.01
