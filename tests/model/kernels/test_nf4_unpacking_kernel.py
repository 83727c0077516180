"""The NF4 kernel against the plain functions, bit for bit."""

import pytest
import torch
from kernel_judges import DTYPES

from llamatune.model.kernels.choice import running_kernels
from llamatune.model.nf4 import NF4Weight
from llamatune.model.packed_weight import Scratch

SHAPES = [(1, 1), (1, 64), (7, 9), (33, 31), (5, 64 * 257), (129, 192)]
"""One block, a last one in part, more than one group of 256 scales, and groups in part."""


def both(weight: NF4Weight, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel unpacks, and what the plain function does; NaN where either writes nothing."""

    def unpacked() -> torch.Tensor:
        weight.scratch.buffer(weight.room, dtype, weight.device).fill_(torch.nan)
        return weight.unpacked(dtype).clone()

    with torch.no_grad():
        found = unpacked()
        with running_kernels(None):
            return found, unpacked()


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = torch.randn(shape) * torch.logspace(-3, 1, shape[0])[:, None]
    found, expected = both(NF4Weight.quantize(W, Scratch()), dtype)
    assert expected.isfinite().all()
    assert torch.equal(found, expected)


@DTYPES
def test_the_edges_of_the_numbers(dtype: torch.dtype) -> None:
    """Blocks of zeros, of numbers below the smallest normal one, of very large ones; all weights alike."""
    W = torch.randn(8, 64) * torch.tensor([0.0, 1e-42, 1e-38, 1e-8, 1.0, 1e4, 1e9, 1e37])[:, None]
    for rows in (W, W[:1], W[1:2], torch.ones(3, 64), torch.full((2, 64), -1e-30)):
        found, expected = both(NF4Weight.quantize(rows, Scratch()), dtype)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_each_code_of_weights_and_scales() -> None:
    """All 256 bytes of two weights, under all 256 codes of scales and a mean that adding rounds."""
    weight = NF4Weight.quantize(torch.randn(256, 512), Scratch())
    weight.codes.copy_(torch.arange(256, dtype=torch.uint8).repeat(256))
    weight.scale_codes.copy_(torch.arange(256, dtype=torch.uint8).repeat_interleave(8))
    weight.scale_factors.uniform_(0.1, 3)
    weight.scale_mean.fill_(0.3333333)
    found, expected = both(weight, torch.float32)
    assert torch.equal(found, expected)
