"""SwiGLU forward and backward in one pass over memory each (Shazeer 2020, eq. 6), computed in fp32, rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _swiglu_forward(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def _swiglu_backward(grad, gate, up, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    activated = g * sigmoid
    tl.store(gate + at, (sigmoid + activated * (1 - sigmoid)) * u * dy, mask=inside)
    tl.store(up + at, dy * activated, mask=inside)


def _grid(count: int) -> tuple[int]:
    return (triton.cdiv(count, _BLOCK),)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up of contiguous tensors of one shape."""
    out = torch.empty_like(gate)
    _swiglu_forward[_grid(gate.numel())](gate, up, out, gate.numel(), BLOCK=_BLOCK)
    return out


def swiglu_in_place(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, in gate's place."""
    _swiglu_forward[_grid(gate.numel())](gate, up, gate, gate.numel(), BLOCK=_BLOCK)
    return gate


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """Gradients with respect to gate and to up, in their places."""
    _swiglu_backward[_grid(gate.numel())](grad, gate, up, gate.numel(), BLOCK=_BLOCK)
