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
    added,
    normalise,
    normalise_backward,
    rotate_back,
    rotate_in_place,
    swiglu_backward,
    swiglu_in_place,
    tiles,
    trained_by,
)
from llamatune.model.layers import RMSNorm, Trained, product_dtype, swiglu
from llamatune.model.rope import Rotation
from llamatune.model.transformer import Block, Context, select_rows


class _AttentionInput(torch.autograd.Function):
    """Norm, q, k and v with their adapters, norms of the heads of q and k where there are any, and their rotation.

    x is all that is kept, and q and k before their own norms.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], head_norms: Sequence[RMSNorm],
        rotation: Rotation, *trained: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dtype = product_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            h = normalise(x, norm, dtype)
            outputs = [part(h) for part in parts]
            raw = outputs[: len(head_norms)]
            outputs[: len(raw)] = [normalise(y, by, dtype) for y, by in zip(raw, head_norms, strict=True)]
            rotate_in_place(outputs[0], outputs[1], *rotation)
        ctx.save_for_backward(x, *raw)
        ctx.settings = norm, parts, head_norms, rotation, dtype
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *raw = ctx.saved_tensors
        norm, parts, head_norms, rotation, dtype = ctx.settings
        wants_input = ctx.needs_input_grad[0]
        h = normalise(x, norm, dtype) if trained_by(parts) else None
        total: Tensor | None = None
        trained: list[Tensor] = []
        for place, (grad, part) in enumerate(zip(grads, parts, strict=True)):
            if place < 2:
                grad = rotate_back(grad, *rotation)
            if place < len(raw):
                grad = normalise_backward(grad, raw[place], head_norms[place])
            total, more = part.gradients(grad, h, wants_input, out=total, add=total is not None)
            trained += more
        dx = None if total is None else normalise_backward(total, x, norm)
        return dx, None, None, None, None, *trained


class _Projected(torch.autograd.Function):
    """A linear layer whose output is added to a residual; its input is all that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, part: Projection, *trained: Tensor) -> Tensor:
        dtype = product_dtype(x)
        ctx.save_for_backward(x)
        ctx.settings = part, dtype
        with torch.autocast(x.device.type, enabled=False):
            return part(x.to(dtype), residual=residual)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,), (grad,) = ctx.saved_tensors, grads
        part, dtype = ctx.settings
        wants_input, wants_residual, *_ = ctx.needs_input_grad
        dx, trained = part.gradients(grad.to(dtype), x.to(dtype), wants_input)
        return None if dx is None else dx.to(x.dtype), grad if wants_residual else None, None, *trained


def feed_forward(
    x: Tensor,
    norm: RMSNorm,
    parts: Sequence[Projection],
    dtype: torch.dtype,
    first_row: int,
    out: Tensor,
    kept: Sequence[Tensor] = (),
) -> None:
    """x + feed-forward of rows that begin at ``first_row`` into ``out``; gate and up into ``kept``, if given."""
    *gate_up, down = parts
    h = normalise(x, norm, dtype)
    gate, up = (part.by_tiles(h, first_row, into) for part, into in zip(gate_up, kept or (None, None), strict=True))
    del h  # before the peak
    for row, g, u, residual, into in tiles(first_row, gate, up, x, out):
        down(swiglu(g, u) if kept else swiglu_in_place(g, u), row, into, residual)


def _feed_forward_backward(
    grad: Tensor,
    x: Tensor,
    norm: RMSNorm,
    parts: Sequence[Projection],
    kept: Sequence[Tensor],
    dtype: torch.dtype,
    first_row: int,
    out: Tensor,
) -> Trained:
    """The gradient with respect to x into ``out``; returned are the trained tensors'. ``kept`` are overwritten."""
    *gate_up, down = parts
    h: Tensor | None = None
    trained_down: Trained = ()
    if not kept:
        h = normalise(x, norm, dtype)
        kept = [part.by_tiles(h, first_row) for part in gate_up]
    for row, dy, g, u in tiles(first_row, grad, *kept):
        activated = swiglu(g, u) if down.layer.trained else None
        da, trained = down.gradients(dy.to(dtype), activated, first_row=row)
        assert da is not None
        del activated  # before the peak
        swiglu_backward(da, g, u)
        trained_down = added(trained_down, trained)
        del da
    if h is None and trained_by(gate_up):
        h = normalise(x, norm, dtype)
    dh = torch.empty(x.shape, dtype=dtype, device=x.device)
    trained_gate, trained_up = (
        part.gradients_by_tiles(dy, h, first_row, dh, add=place > 0)
        for place, (part, dy) in enumerate(zip(gate_up, kept, strict=True))
    )
    del h
    normalise_backward(dh, x, norm, beside=grad, into=out)
    return *trained_gate, *trained_up, *trained_down


def feed_forward_gradients(
    grad: Tensor, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], kept: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Trained]:
    """Gradients with respect to x and the trained tensors; without gate and up ``kept``, a tile of rows at a time."""
    dx = torch.empty_like(x)
    if kept:
        return dx, _feed_forward_backward(grad, x, norm, parts, kept, dtype, 0, dx)
    total: Trained = ()
    for row, dy, tile, into in tiles(0, grad, x, dx):
        total = added(total, _feed_forward_backward(dy, tile, norm, parts, (), dtype, row, into))
    return dx, total


class FusedFeedForward(torch.autograd.Function):
    """x + feed-forward of its norm, with adapters; kept are x, and gate and up unless ``recompute``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], recompute: bool, *trained: Tensor
    ) -> Tensor:
        dtype = product_dtype(x)
        widths = [] if recompute else [part.layer.out_features for part in parts[:2]]  # of gate and up
        kept = [torch.empty(len(x), width, dtype=dtype, device=x.device) for width in widths]
        y = torch.empty_like(x)
        with torch.autocast(x.device.type, enabled=False):
            for row, tile, into in [(0, x, y)] if kept else tiles(0, x, y):
                feed_forward(tile, norm, parts, dtype, row, into, kept)
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
    head_dim, head_norms, inputs = block.self_attn.head_dim, block.self_attn.head_norms, parts[:3]
    q, k, v = _AttentionInput.apply(  # type: ignore[no-untyped-call]
        x, block.input_layernorm, inputs, head_norms, context.rotation, *trained_by(inputs)
    )
    q, k, v = (y.view(1, len(y), -1, head_dim).transpose(1, 2) for y in (q, k, v))  # (1, H or K, N, E)
    with around:
        o = attend(q, k, v, None, context.documents)  # (1, H, N, E)
    return select_rows(o.transpose(1, 2).flatten(2), rows).squeeze(0)


def projected(o: Tensor, by: Projection, residual: Tensor) -> Tensor:
    """residual + o_proj, (N, H * E) -> (N, D)."""
    return _Projected.apply(o, residual, by, *by.layer.trained)  # type: ignore[no-any-return, no-untyped-call]
