"""RMSNorm forward and backward in one pass over memory each (Zhang & Sennrich 2019), computed in fp32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamatune.model.layers import RMSNorm


@triton.jit
def _rms_norm_forward(x, weight, out, row_stride, width, eps, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < width
    wide = tl.load(x + row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, wide * scale * w, mask=inside)


@triton.jit
def _rms_norm_backward(
    grad, x, weight, beside, out, grad_stride, x_stride, beside_stride, out_stride, width, eps,
    BESIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < width
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    dh *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    unit = wide * scale
    dx = scale * (dh - unit * (tl.sum(dh * unit) / width))
    if BESIDE:
        dx += tl.load(beside + row * beside_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, dx, mask=inside)


def _settings(width: int) -> dict[str, int]:
    """A program computes a row: its elements, and the warps that hold them in registers."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


def _rows(x: Tensor, width: int) -> Tensor:
    """(rows, width), a view where rows lie at equal distances."""
    rows = x.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _normalised(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    width = len(weight)
    rows, out = _rows(x, width), torch.empty(x.shape, dtype=dtype, device=x.device)
    if len(rows):
        _rms_norm_forward[(len(rows),)](rows, weight, out, rows.stride(0), width, eps, **_settings(width))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in x's dtype."""
    return _normalised(x, weight, eps, x.dtype)


def normalise(x: Tensor, norm: RMSNorm, dtype: torch.dtype) -> Tensor:
    """RMSNorm in ``dtype`` of x (N, D), or of the heads side by side in it."""
    return _normalised(x, norm.weight, norm.eps, dtype)


def normalise_backward(
    grad: Tensor, x: Tensor, norm: RMSNorm, beside: Tensor | None = None, into: Tensor | None = None
) -> Tensor:
    """The gradient with respect to x (N, D), in x's dtype, and ``beside``; ``into`` may be one of the others."""
    out, width = torch.empty(x.shape, dtype=x.dtype, device=x.device) if into is None else into, len(norm.weight)
    rows = [part.view(-1, width) for part in (grad, x, x if beside is None else beside, out)]
    assert all(part.stride(1) == 1 for part in rows), "the elements of a row lie together"
    if len(x):
        dh, tile, added, into_rows = rows
        _rms_norm_backward[(len(tile),)](
            dh, tile, norm.weight, added, into_rows, *(part.stride(0) for part in rows),
            width, norm.eps, BESIDE=beside is not None, **_settings(width),
        )  # fmt: skip
    return out
