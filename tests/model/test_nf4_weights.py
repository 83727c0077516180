"""NF4 against a slow reading of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llamatune.model.blockwise_8bit import dynamic_levels
from llamatune.model.nf4 import LEVELS, NF4Weight
from llamatune.model.packed_weight import Scratch
from llamatune.shapes.tile_sizes import WEIGHTS_AT_ONCE

SHAPES = [(64, 64), (37, 53), (1, 1), (3, 5), (1, 200), (130, 129), (257, 128), (100, 48)]


def matrix(shape: tuple[int, ...], std: float = 0.02, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def nearest(value: float, levels: list[float]) -> int:
    return min(range(len(levels)), key=lambda index: abs(value - levels[index]))


def slowly_quantized(W: Tensor) -> tuple[list[int], list[float], Tensor]:
    """Codes, scales as read back, and weights, one number at a time."""
    flat = W.flatten().double().tolist()
    blocks = [flat[begin : begin + 64] for begin in range(0, len(flat), 64)]
    largest = torch.tensor([max(map(abs, block)) for block in blocks], dtype=torch.float32)
    mean = torch.tensor(sum(largest.tolist()) / len(blocks), dtype=torch.float32)
    eight_bit, scales = dynamic_levels(signed=True).tolist(), []
    for group in (largest - mean).split(256):
        factor = group.abs().max()
        for rest in group:
            level = torch.tensor(eight_bit[nearest(float(rest / factor) if factor else 0.0, eight_bit)])
            scales.append(float(level * factor + mean))
    codes, weights = [], []
    for block, scale in zip(blocks, scales, strict=True):
        for weight in block:
            codes.append(nearest(weight, [level * scale for level in LEVELS]))
            weights.append(LEVELS[codes[-1]] * scale)
    return codes, scales, torch.tensor(weights, dtype=torch.float64).view(W.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_code_and_scale_is_that_of_the_slow_reading(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = matrix(shape).to(dtype)
    W.view(-1)[0] *= 30  # an outlier block
    packed = NF4Weight.quantize(W, Scratch())
    codes, scales, weights = slowly_quantized(W)
    found = torch.stack((packed.codes >> 4, packed.codes & 15), 1).view(-1)[: W.numel()]
    torch.testing.assert_close(packed.scales(), torch.tensor(scales), rtol=1e-6, atol=0)
    differing = int((found != torch.tensor(codes)).sum())
    # A 16-bit weight can lie exactly between two levels, up to the last bit of the scale.
    assert differing <= (0 if dtype == torch.float32 else max(1, W.numel() // 500))
    error = (packed.unpacked(torch.float32).double() - W.double()).norm()
    torch.testing.assert_close(error, (weights - W.double()).norm(), rtol=1e-5, atol=1e-9)


def test_the_dynamic_map_is_the_papers() -> None:
    """Seven decades below 1; each level is the middle of a cell, and each decade has twice those of the one below."""
    for signed in (True, False):
        levels = dynamic_levels(signed).tolist()
        assert len(levels) == len(set(levels)) == 256
        assert (0.0 in levels, levels[-1]) == (True, 1.0)
        for decade in range(7):
            low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
            inside = [level for level in levels if low < level < high]
            cells = 2**decade * (1 if signed else 2)
            expected = [low + (high - low) * (2 * cell + 1) / (2 * cells) for cell in range(cells)]
            assert inside == pytest.approx(expected, rel=1e-5)
            negative = sorted(-level for level in levels if -high < level < -low)
            assert negative == (inside if signed else [])


def test_the_error_on_a_normal_matrix_is_the_known_one() -> None:
    """0.0921 of the norm in blocks of 64 with exact scales, by an independent count; the rest is our better choice."""
    W = matrix((1024, 1024))
    blocks = W.view(-1, 64).double()
    largest = blocks.abs().amax(1, keepdim=True)
    distance = (blocks[..., None] / largest[..., None] - torch.tensor(LEVELS).double()).abs().amin(-1) * largest
    exact = float(distance.norm() / blocks.norm())
    assert exact == pytest.approx(0.0921, abs=5e-4)
    found = NF4Weight.quantize(W, Scratch()).unpacked(torch.float32)
    assert float((found - W).norm() / W.norm()) == pytest.approx(exact, rel=5e-3)


def test_it_costs_half_a_byte_and_a_64th_a_weight() -> None:
    packed = NF4Weight.quantize(matrix((512, 1024)), Scratch())
    expected = 0.5 + 1 / 64 + 4 / (64 * 256)
    assert sum(buffer.nbytes for buffer in packed.buffers()) / (512 * 1024) == pytest.approx(expected, rel=1e-4)
    assert expected == pytest.approx(0.516, abs=5e-4)


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
def test_constant_and_empty_blocks_come_back(value: float) -> None:
    W = torch.full((70, 64), value)
    W[5] = 0.0
    torch.testing.assert_close(NF4Weight.quantize(W, Scratch()).unpacked(torch.float32), W, rtol=6e-3, atol=0)


def test_unpacking_is_the_same_in_pieces_and_in_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = NF4Weight.quantize(matrix((200, 130)), Scratch())
    whole = packed.unpacked(torch.float32).clone()
    for dtype, tolerance in ((torch.bfloat16, 2**-7), (torch.float16, 2**-9)):
        torch.testing.assert_close(packed.unpacked(dtype).float(), whole, rtol=tolerance, atol=1e-7)
    monkeypatch.setitem(WEIGHTS_AT_ONCE, "cpu", 256)
    assert torch.equal(packed.unpacked(torch.float32), whole)
    assert torch.equal(NF4Weight.quantize(matrix((200, 130)), Scratch()).unpacked(torch.float32), whole)
