"""Rows quantised to e4m3 and codes transposed, each in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamatune.shapes.float8_products import LARGEST, LEAST_SCALE

_TILE = 64


@triton.jit
def _e4m3(x):
    """The codes of fp32 numbers up to 448 in magnitude, in uint8. Of NaN, one that is NaN.

    By hand, because Triton's interpreter does not carry into the exponent where it rounds.
    """
    bits = tl.abs(x).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)  # to 3 bits of mantissa, and bias 7 from 127
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 15  # at 2^14 a unit in the last place is 2^-9
    code = tl.where(tl.abs(x) < 0.015625, small, normal)
    code = tl.where(x != x, 127, code)
    return (code | ((x.to(tl.int32, bitcast=True) >> 24) & 128)).to(tl.uint8)


@triton.jit
def _quantize_float8_rows(
    x, factors, codes, scales, width, stride, HAS_FACTORS: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    value = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_FACTORS:
        value *= tl.load(factors + at, mask=inside, other=0.0)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(value), 0), LARGEST), LEAST)
    tl.store(scales + row, scale)
    tl.store(codes + row * width + at, _e4m3(tl.div_rn(value, scale)), mask=inside)


@triton.jit
def _transpose_bytes(codes, out, rows, columns, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(codes + row.to(tl.int64)[:, None] * columns + column[None, :], mask=inside, other=0)
    tl.store(out + column.to(tl.int64)[:, None] * rows + row[None, :], tl.trans(tile), mask=tl.trans(inside))


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """e4m3 codes (N, D) and fp32 scales (N, 1) of x (N, D) times ``factors`` (D,)."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, width = x.shape
    codes = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _quantize_float8_rows[(rows,)](
        x, factors, codes.view(torch.uint8), scales, width, x.stride(0), HAS_FACTORS=factors is not None,
        LARGEST=LARGEST, LEAST=LEAST_SCALE, BLOCK=block, num_warps=min(16, max(4, block // 1024)),
    )  # fmt: skip
    return codes, scales


def transpose_bytes(codes: Tensor, out: Tensor) -> None:
    """Write the transpose of ``codes`` (R, C) into ``out`` (C, R), both uint8 and contiguous."""
    rows, columns = codes.shape
    grid = triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE)
    _transpose_bytes[grid](codes, out, rows, columns, TILE=_TILE)
