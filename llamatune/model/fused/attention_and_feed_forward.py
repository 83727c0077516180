"""Attention and feed-forward halves of the fused block: autograd functions with a hand-written backward pass.

The plain modules are the specification; these compute the same from the same weights. What autograd would save is
computed again from a half's input: norms always, and more as the level of recomputation says. Frozen weights get no
gradient, LoRA's intermediates are rank-wide, dropout is redrawn from its seed, and rotation happens in place.

Shapes as in ``transformer``: x (N, D) is a row of tokens, weights (out, in).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llamatune.model.attention import attend
from llamatune.model.fused.operations import (
    Projection,
    normalise,
    normalise_backward,
    rotate_back,
    rotate_in_place,
    swiglu_backward,
    swiglu_in_place,
    trained_by,
)
from llamatune.model.layers import RMSNorm, Trained, product_dtype, swiglu
from llamatune.model.rope import Rotation
from llamatune.model.transformer import Block, Context, select_rows
from llamatune.shapes import tile_sizes


class _AttentionInput(torch.autograd.Function):
    """Norm, q, k and v with their adapters, and rotation of q and k; x is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], rotation: Rotation, *trained: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dtype = product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            h = normalise(x, norm, dtype)
            outputs = tuple(part(h) for part in parts)
            rotate_in_place(outputs[0], outputs[1], *rotation)
        ctx.save_for_backward(x)
        ctx.settings = norm, parts, rotation, dtype
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        norm, parts, rotation, dtype = ctx.settings
        wants_input = ctx.needs_input_grad[0]
        h = normalise(x, norm, dtype) if trained_by(parts) else None
        total: Tensor | None = None
        trained: list[Tensor] = []
        for place, (grad, part) in enumerate(zip(grads, parts, strict=True)):
            if place < 2:
                grad = rotate_back(grad, *rotation)
            dh, more = part.gradients(grad, h, wants_input)
            if dh is not None:
                total = dh if total is None else total.add_(dh)
            trained += more
        dx = None if total is None else normalise_backward(total, x, norm)
        return dx, None, None, None, *trained


class _Projected(torch.autograd.Function):
    """One linear layer; its input is all that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Projection, *trained: Tensor) -> Tensor:
        dtype = product_dtype(x)
        ctx.save_for_backward(x)
        ctx.settings = part, dtype
        with torch.autocast(x.device.type, enabled=False):
            return part(x.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        part, dtype = ctx.settings
        dx, trained = part.gradients(grads[0].to(dtype), x.to(dtype), ctx.needs_input_grad[0])
        return None if dx is None else dx.to(x.dtype), None, *trained


def feed_forward(
    x: Tensor, norm: RMSNorm, parts: Sequence[Projection], dtype: torch.dtype, first: int, kept: Sequence[Tensor] = ()
) -> Tensor:
    """SwiGLU of a tile whose rows begin at ``first``; gate and up go into the rows of ``kept``, if there are any."""
    gate, up, down = parts
    h = normalise(x, norm, dtype)
    g, u = gate(h, first), up(h, first)
    for whole, tile in zip(kept, (g, u), strict=bool(kept)):
        whole[first : first + len(x)] = tile
    return down(swiglu_in_place(g, u), first)


def _feed_forward_backward(
    grad: Tensor, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], kept: tuple[Tensor, Tensor] | None, first: int
) -> tuple[Tensor, Trained]:
    """Gradients of a tile with respect to the normed x and the trained tensors; ``kept`` are gate and up, if kept."""
    gate, up, down = parts
    h = normalise(x, norm, grad.dtype) if trained_by((gate, up)) or kept is None else None
    if kept is None:
        assert h is not None
        g, u = gate(h, first), up(h, first)
    else:
        g, u = kept
    activated = swiglu(g, u) if down.layer.trained else None
    da, trained_down = down.gradients(grad, activated, first_row=first)
    assert da is not None
    del activated  # before the peak
    dg, du = swiglu_backward(da, g, u)
    dh, trained_gate = gate.gradients(dg, h, first_row=first)
    more, trained_up = up.gradients(du, h, first_row=first)
    assert dh is not None
    assert more is not None
    return dh.add_(more), (*trained_gate, *trained_up, *trained_down)


def feed_forward_gradients(
    grad: Tensor, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], kept: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Trained]:
    """Gradients with respect to x and the trained tensors, a tile of rows at a time."""
    dx = torch.empty_like(x)
    total: Trained = ()
    for start in range(0, len(x), tile_sizes.TILE_TOKENS):
        rows = slice(start, start + tile_sizes.TILE_TOKENS)
        held = (kept[0][rows], kept[1][rows]) if kept else None
        dh, more = _feed_forward_backward(grad[rows].to(dtype), x[rows], norm, parts, held, start)
        dx[rows] = normalise_backward(dh, x[rows], norm)
        for before, addend in zip(total, more, strict=bool(total)):
            before.add_(addend)
        total = total or more
    return dx, total


class FusedFeedForward(torch.autograd.Function):
    """Norm, gate, up, SiLU, product and down with their adapters; kept are x, and gate and up unless ``recompute``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], recompute: bool, *trained: Tensor
    ) -> Tensor:
        dtype = product_dtype(x)
        widths = [] if recompute else [part.layer.out_features for part in parts[:2]]  # of gate and up
        kept = [torch.empty(len(x), width, dtype=dtype, device=x.device) for width in widths]
        with torch.autocast(x.device.type, enabled=False):
            size = tile_sizes.TILE_TOKENS
            outputs = [feed_forward(x[s : s + size], norm, parts, dtype, s, kept) for s in range(0, len(x), size)]
            y = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        ctx.save_for_backward(x, *kept)
        ctx.settings = norm, parts, dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *kept = ctx.saved_tensors
        norm, parts, dtype = ctx.settings
        dx, trained = feed_forward_gradients(grads[0], x, norm, parts, kept, dtype)
        return dx if ctx.needs_input_grad[0] else None, None, None, None, *trained


def attended(
    block: Block,
    context: Context,
    rows: Tensor | None,
    parts: Sequence[Projection],
    x: Tensor,
    around: contextlib.AbstractContextManager[object] = contextlib.nullcontext(),  # noqa: B008 - it has no state
) -> Tensor:
    """Norm, q, k, v, rotation and attention, the latter inside ``around``: (N, D) -> (N or len(rows), H * E)."""
    head_dim, inputs = block.self_attn.head_dim, parts[:3]
    q, k, v = _AttentionInput.apply(  # type: ignore[no-untyped-call]
        x, block.input_layernorm, inputs, context.rotation, *trained_by(inputs)
    )
    q, k, v = (y.view(1, len(y), -1, head_dim).transpose(1, 2) for y in (q, k, v))  # (1, H or K, N, E)
    with around:
        o = attend(q, k, v, None, context.documents)  # (1, H, N, E)
    return select_rows(o.transpose(1, 2).flatten(2), rows).squeeze(0)


def projected(o: Tensor, by: Projection) -> Tensor:
    """o_proj, (N, H * E) -> (N, D)."""
    return _Projected.apply(o, by, *by.layer.trained)  # type: ignore[no-any-return, no-untyped-call]
