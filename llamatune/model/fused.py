"""The block's two halves as hand-written autograd functions that keep little for the backward pass.

The plain modules are the specification; these compute the same from the same weights. What autograd would save is
recomputed from a half's input instead: norms always, and more as ``recompute`` chooses. Frozen weights get no gradient,
LoRA's intermediates are rank-wide, dropout is redrawn from its seed, and rotation happens in place.

Shapes as in ``transformer``: x (N, D) is a row of tokens, weights (out, in), A (R, in), B (out, R).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llamatune.model.attention import attend
from llamatune.model.projection import (
    TILE_TOKENS,
    Projection,
    normalise,
    normalise_backward,
    project,
    project_backward,
    rotate_in_place,
    swiglu_backward,
    swiglu_in_place,
)
from llamatune.model.transformer import Block, Context, RMSNorm, Rotation, swiglu


def computing_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype, or x's own outside autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _AttentionInput(torch.autograd.Function):
    """Norm, q, k and v with LoRA, and rotation of q and k; x is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], rotation: Rotation, head_dim: int,
        *trained: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dtype = computing_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            h = normalise(x, norm, dtype)
            outputs = tuple(project(h, part) for part in parts)
            for y in outputs[:2]:
                rotate_in_place(y, rotation, head_dim)
        ctx.save_for_backward(x)
        ctx.settings = norm, parts, rotation, head_dim, dtype
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        norm, parts, rotation, head_dim, dtype = ctx.settings
        wants_input = ctx.needs_input_grad[0]
        adapted = any(part.lora_A is not None for part in parts)
        h = normalise(x, norm, dtype) if adapted else None
        total: Tensor | None = None
        trained: list[Tensor | None] = []
        for place, (grad, part) in enumerate(zip(grads, parts, strict=True)):
            if place < 2:
                grad = grad.clone(memory_format=torch.contiguous_format)
                rotate_in_place(grad, rotation, head_dim, back=True)
            dh, dA, dB = project_backward(grad, h, part, wants_input)
            if dh is not None:
                total = dh if total is None else total.add_(dh)
            trained += [dA, dB]
        dx = None if total is None else normalise_backward(total, x, norm)
        return dx, None, None, None, None, *trained


class _Projected(torch.autograd.Function):
    """One adapted layer; its input is all that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Projection, *trained: Tensor | None) -> Tensor:
        dtype = computing_dtype(x)
        ctx.save_for_backward(x)
        ctx.settings = part, dtype
        with torch.autocast(x.device.type, enabled=False):
            return project(x.to(dtype), part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        part, dtype = ctx.settings
        dx, dA, dB = project_backward(grads[0].to(dtype), x.to(dtype), part, ctx.needs_input_grad[0])
        return None if dx is None else dx.to(x.dtype), None, dA, dB


def feed_forward(
    x: Tensor,
    norm: RMSNorm,
    parts: Sequence[Projection],
    dtype: torch.dtype,
    first: int,
    kept: Sequence[Tensor] = (),
) -> Tensor:
    """SwiGLU of a tile whose rows begin at ``first``; gate and up go into the rows of ``kept``, if there are any."""
    gate, up, down = parts
    h = normalise(x, norm, dtype)
    g, u = project(h, gate, first), project(h, up, first)
    for whole, tile in zip(kept, (g, u), strict=False):
        whole[first : first + len(x)] = tile
    return project(swiglu_in_place(g, u), down, first)


def _feed_forward_backward(
    grad: Tensor,
    x: Tensor,
    norm: RMSNorm,
    parts: Sequence[Projection],
    kept: tuple[Tensor, Tensor] | None,
    first: int,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of a tile with respect to the normed x and the trained matrices; ``kept`` are gate and up, if kept."""
    gate, up, down = parts
    adapted = gate.lora_A is not None or up.lora_A is not None
    h = normalise(x, norm, grad.dtype) if adapted or kept is None else None
    if kept is None:
        assert h is not None
        g, u = project(h, gate, first), project(h, up, first)
    else:
        g, u = kept
    activated = swiglu(g, u) if down.lora_A is not None else None
    da, dA_down, dB_down = project_backward(grad, activated, down, first_row=first)
    assert da is not None
    del activated  # before the peak
    dg, du = swiglu_backward(da, g, u)
    dh, dA_gate, dB_gate = project_backward(dg, h, gate, first_row=first)
    more, dA_up, dB_up = project_backward(du, h, up, first_row=first)
    assert dh is not None
    assert more is not None
    return dh.add_(more), [dA_gate, dB_gate, dA_up, dB_up, dA_down, dB_down]


def feed_forward_gradients(
    grad: Tensor, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], kept: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients with respect to x and the trained matrices, a tile of rows at a time."""
    dx = torch.empty_like(x)
    total: list[Tensor | None] = []
    for start in range(0, len(x), TILE_TOKENS):
        rows = slice(start, start + TILE_TOKENS)
        held = (kept[0][rows], kept[1][rows]) if kept else None
        dh, more = _feed_forward_backward(grad[rows].to(dtype), x[rows], norm, parts, held, start)
        dx[rows] = normalise_backward(dh, x[rows], norm)
        for before, addend in zip(total, more, strict=bool(total)):
            if before is not None and addend is not None:
                before.add_(addend)
        total = total or more
    return dx, total


class _FeedForward(torch.autograd.Function):
    """Norm, gate, up, SiLU, product and down with LoRA; x is kept, and gate and up unless they are recomputed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], recompute: bool, *trained: Tensor | None
    ) -> Tensor:
        dtype = computing_dtype(x)
        kept: list[Tensor] = []
        if not recompute:
            kept += [torch.empty(len(x), part.out_features, dtype=dtype, device=x.device) for part in parts[:2]]
        with torch.autocast(x.device.type, enabled=False):
            starts = range(0, len(x), TILE_TOKENS)
            outputs = [feed_forward(x[s : s + TILE_TOKENS], norm, parts, dtype, s, kept) for s in starts]
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


def attention_parts(block: Block) -> tuple[Projection, ...]:
    """q, k, v and o, their dropout seeds drawn: whoever runs them again drops the same."""
    module = block.self_attn
    return tuple(Projection.of(layer) for layer in (module.q_proj, module.k_proj, module.v_proj, module.o_proj))


def feed_forward_parts(block: Block) -> tuple[Projection, ...]:
    """gate, up and down, likewise."""
    module = block.mlp
    return tuple(Projection.of(layer) for layer in (module.gate_proj, module.up_proj, module.down_proj))


def trained_by(parts: Sequence[Projection]) -> list[Tensor | None]:
    """A and B of each, None where a layer is not adapted."""
    return [tensor for part in parts for tensor in part.trained]


def only_row(x: Tensor) -> Tensor:
    """(N, D) of (1, N, D): batches are rows without padding."""
    assert len(x) == 1, "fused blocks take one row of samples"
    return x[0]


def attended(
    block: Block,
    x: Tensor,
    context: Context,
    parts: Sequence[Projection],
    around: contextlib.AbstractContextManager[object] = contextlib.nullcontext(),  # noqa: B008 - it has no state
) -> Tensor:
    """Norm, q, k, v, rotation and attention, the latter inside ``around``: (N, D) -> (N or asked-for rows, H * E)."""
    module, inputs = block.self_attn, parts[:3]
    q, k, v = _AttentionInput.apply(  # type: ignore[no-untyped-call]
        x, block.input_layernorm, inputs, context.rotation, module.head_dim, *trained_by(inputs)
    )
    q, k, v = (y.view(1, len(y), -1, module.head_dim).transpose(1, 2) for y in (q, k, v))  # (1, H or K, N, E)
    with around:
        o = attend(q, k, v, None, context.documents)  # (1, H, N, E)
    return context.needed(o.transpose(1, 2).flatten(2), module.layer)[0]


def projected(o: Tensor, by: Projection) -> Tensor:
    """o_proj, (N, H * E) -> (N, D)."""
    return _Projected.apply(o, by, *by.trained)  # type: ignore[no-any-return, no-untyped-call]


def fed_forward(block: Block, x: Tensor, recompute: bool) -> Tensor:
    """Norm, gate, up, SiLU, product and down: (N, D) -> (N, D)."""
    parts = feed_forward_parts(block)
    return _FeedForward.apply(  # type: ignore[no-any-return, no-untyped-call]
        x, block.post_attention_layernorm, parts, recompute, *trained_by(parts)
    )
