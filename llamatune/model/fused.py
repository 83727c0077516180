"""The block's two halves as hand-written autograd functions that keep little for the backward pass.

The plain modules are the specification; these compute the same from the same weights. What autograd would save is
recomputed from a half's input instead: norms always, and by ``Recompute`` more. Frozen weights get no gradient, LoRA's
intermediates are rank-wide, dropout is redrawn from its seed, and rotation happens in place. Kept per token and layer
of LLaMA-2-7B in 16 bits: 92 KiB at NOTHING, 49 at FEED_FORWARD, 8 at BLOCK.

Shapes as in ``transformer``: x (N, D) is a row of tokens, weights (out, in), A (R, in), B (out, R).
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model.attention import attend
from llamatune.model.projection import (
    TILE_TOKENS,
    Projection,
    normalise,
    normalise_backward,
    project,
    project_backward,
    rotate_in_place,
    tiles,
)
from llamatune.model.transformer import Block, Context, RMSNorm, Rotation


class Recompute(enum.IntEnum):
    """What the backward pass makes again, beside the norms: nothing, gate and up, or the whole block but ``down``."""

    NOTHING = 0
    FEED_FORWARD = 1
    BLOCK = 3


def _computing_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _AttentionInput(torch.autograd.Function):
    """Norm, q, k and v with LoRA, and rotation of q and k; x is all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], rotation: Rotation, head_dim: int,
        *trained: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dtype = _computing_dtype(x)
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
        dtype = _computing_dtype(x)
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


def _feed_forward(x: Tensor, norm: RMSNorm, parts: Sequence[Projection], dtype: torch.dtype, first: int) -> Tensor:
    """SwiGLU of a tile whose rows begin at ``first``, nothing kept."""
    gate, up, down = parts
    h = normalise(x, norm, dtype)
    g = F.silu(project(h, gate, first), inplace=True)
    return project(g.mul_(project(h, up, first)), down, first)


def _feed_forward_backward(
    grad: Tensor,
    x: Tensor,
    norm: RMSNorm,
    parts: Sequence[Projection],
    kept: tuple[Tensor, Tensor] | None,
    first: int,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of a tile with respect to x and the trained matrices; ``kept`` are gate and up, if they were."""
    gate, up, down = parts
    adapted = gate.lora_A is not None or up.lora_A is not None
    h = normalise(x, norm, grad.dtype) if adapted or kept is None else None
    if kept is None:
        assert h is not None
        g, u = project(h, gate, first), project(h, up, first)
    else:
        g, u = kept
    sigmoid = torch.sigmoid(g)
    activated = g * sigmoid  # silu(g)
    da, dA_down, dB_down = project_backward(
        grad, activated * u if down.lora_A is not None else None, down, first_row=first
    )
    assert da is not None
    # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
    slope = (1 - sigmoid).mul_(activated).add_(sigmoid)
    dg = slope.mul_(da).mul_(u)
    du = da.mul_(activated)
    dh, dA_gate, dB_gate = project_backward(dg, h, gate, first_row=first)
    more, dA_up, dB_up = project_backward(du, h, up, first_row=first)
    assert dh is not None
    assert more is not None
    return normalise_backward(dh.add_(more), x, norm), [dA_gate, dB_gate, dA_up, dB_up, dA_down, dB_down]


def _feed_forward_gradients(
    grad: Tensor, x: Tensor, norm: RMSNorm, parts: Sequence[Projection], kept: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients with respect to x and the trained matrices, a tile of rows at a time."""
    dx = torch.empty_like(x)
    total: list[Tensor | None] = []
    for start in range(0, len(x), TILE_TOKENS):
        rows = slice(start, start + TILE_TOKENS)
        held = (kept[0][rows], kept[1][rows]) if kept else None
        dx[rows], more = _feed_forward_backward(grad[rows].to(dtype), x[rows], norm, parts, held, start)
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
        dtype = _computing_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            if recompute:
                starts = range(0, len(x), TILE_TOKENS)
                outputs = [_feed_forward(x[s : s + TILE_TOKENS], norm, parts, dtype, s) for s in starts]
                y = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
                ctx.save_for_backward(x)
            else:
                gate, up, down = parts
                kept = []
                for part in (gate, up):
                    kept.append(torch.empty(len(x), part.out_features, dtype=dtype, device=x.device))
                outputs = []
                for start in range(0, len(x), TILE_TOKENS):
                    rows = slice(start, start + TILE_TOKENS)
                    h = normalise(x[rows], norm, dtype)
                    g, u = project(h, gate, start), project(h, up, start)
                    kept[0][rows], kept[1][rows] = g, u
                    outputs.append(project(F.silu(g, inplace=True).mul_(u), down, start))
                y = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
                ctx.save_for_backward(x, *kept)
        ctx.settings = norm, parts, dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, *kept = ctx.saved_tensors
        norm, parts, dtype = ctx.settings
        dx, trained = _feed_forward_gradients(grads[0], x, norm, parts, kept, dtype)
        return dx if ctx.needs_input_grad[0] else None, None, None, None, *trained


def _attention_parts(block: Block) -> tuple[Projection, ...]:
    """q, k, v and o, their dropout seeds drawn: whoever runs them again drops the same."""
    module = block.self_attn
    return tuple(Projection.of(layer) for layer in (module.q_proj, module.k_proj, module.v_proj, module.o_proj))


def _feed_forward_parts(block: Block) -> tuple[Projection, ...]:
    module = block.mlp
    return tuple(Projection.of(layer) for layer in (module.gate_proj, module.up_proj, module.down_proj))


def _trained(parts: Sequence[Projection]) -> list[Tensor | None]:
    return [tensor for part in parts for tensor in part.trained]


def _only_row(x: Tensor) -> Tensor:
    """(N, D) of (1, N, D): batches are rows without padding."""
    assert len(x) == 1, "fused blocks take one row of samples"
    return x[0]


def _attention(block: Block, x: Tensor, context: Context, parts: Sequence[Projection]) -> Tensor:
    """Norm, attention and o_proj: (N, D) -> (N or asked-for rows, D)."""
    module, inputs, output = block.self_attn, parts[:3], parts[3]
    q, k, v = _AttentionInput.apply(  # type: ignore[no-untyped-call]
        x, block.input_layernorm, inputs, context.rotation, module.head_dim, *_trained(inputs)
    )
    q, k, v = (y.view(1, len(y), -1, module.head_dim).transpose(1, 2) for y in (q, k, v))  # (1, H or K, N, E)
    o = attend(q, k, v, None, context.documents)  # (1, H, N, E)
    o = context.needed(o.transpose(1, 2).flatten(2), module.layer)[0]  # (N, H * E)
    return _Projected.apply(o, output, *output.trained)  # type: ignore[no-any-return, no-untyped-call]


class _RecomputedBlock(torch.autograd.Function):
    """A whole block of which only x is kept. Its attention is run again in the backward pass, ``down`` never is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Block,
        context: Context,
        attention: Sequence[Projection],
        feed_forward: Sequence[Projection],
        *trained: Tensor | None,
    ) -> Tensor:
        dtype = _computing_dtype(x)
        ctx.save_for_backward(x)
        ctx.settings = block, context, attention, feed_forward, dtype, torch.is_autocast_enabled(x.device.type)
        middle = context.needed(x[None], block.self_attn.layer)[0] + _attention(block, x, context, attention)
        norm = block.post_attention_layernorm
        with torch.autocast(x.device.type, enabled=False):
            starts = range(0, len(middle), TILE_TOKENS)
            for start, tile in zip(starts, tiles(middle), strict=True):
                tile.add_(_feed_forward(tile, norm, feed_forward, dtype, start))
        return middle

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        block, context, attention, feed_forward, dtype, autocast = ctx.settings
        wants_input = ctx.needs_input_grad[0]
        x = ctx.saved_tensors[0].detach().requires_grad_(wants_input)
        with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=autocast):
            middle = context.needed(x[None], block.self_attn.layer)[0] + _attention(block, x, context, attention)
        norm = block.post_attention_layernorm
        dx, last = _feed_forward_gradients(grads[0], middle.detach(), norm, feed_forward, (), dtype)
        first = _trained(attention)
        wanted = [tensor for tensor in (x, *first) if tensor is not None and tensor.requires_grad]
        if not wanted:
            return None, None, None, None, None, *(None for _ in first), *last
        found = iter(torch.autograd.grad(middle, wanted, dx.add_(grads[0])))
        own = [next(found) if wants_input else None]
        own += [None if tensor is None else next(found) for tensor in first]
        return own[0], None, None, None, None, *own[1:], *last


def _fused_attend(block: Block, x: Tensor, context: Context) -> Tensor:
    return _attention(block, _only_row(x), context, _attention_parts(block))[None]


def _fused_feed_forward(block: Block, again: bool, x: Tensor) -> Tensor:
    parts = _feed_forward_parts(block)
    y = _FeedForward.apply(_only_row(x), block.post_attention_layernorm, parts, again, *_trained(parts))  # type: ignore[no-untyped-call]
    return y[None]  # type: ignore[no-any-return]


def _run_recomputed(block: Block, x: Tensor, context: Context) -> Tensor:
    first, last = _attention_parts(block), _feed_forward_parts(block)
    y = _RecomputedBlock.apply(_only_row(x), block, context, first, last, *_trained((*first, *last)))  # type: ignore[no-untyped-call]
    return y[None]  # type: ignore[no-any-return]


def apply_fused(block: Block, recompute: Recompute = Recompute.NOTHING) -> None:
    """Let a block of a LoRA model compute through these functions: rows without padding, no cache."""
    if recompute is Recompute.BLOCK:
        block.run_block = _run_recomputed
        return
    block.attend = functools.partial(_fused_attend, block)  # type: ignore[method-assign]
    again = recompute is Recompute.FEED_FORWARD
    block.feed_forward = functools.partial(_fused_feed_forward, block, again)  # type: ignore[method-assign]
