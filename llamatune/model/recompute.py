"""How much of a fused block the backward pass computes again, in exchange for what is kept between the passes.

Every level gives the same bits: dropout's seeds are drawn once, in the same order, and what is computed again is what
was computed before.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from llamatune.model.fused import (
    attended,
    attention_parts,
    computing_dtype,
    fed_forward,
    feed_forward,
    feed_forward_gradients,
    feed_forward_parts,
    only_row,
    projected,
    trained_by,
)
from llamatune.model.projection import TILE_TOKENS, Projection, tiles
from llamatune.model.transformer import Block, Context


class Recompute(enum.IntEnum):
    """What the backward pass makes again, beside the norms, and what is kept per token and layer of LLaMA-2-7B.

    NOTHING: 92 KiB in 16 bits. FEED_FORWARD, gate and up: 49. PROJECTIONS, q, k, v, gate and up: 24. BLOCK, all but
    ``down``, attention too: 8.
    """

    NOTHING = 0
    FEED_FORWARD = 1
    PROJECTIONS = 2
    BLOCK = 3


_ATTENTION_KERNELS = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
}
"""Their outputs, one row and one number for each token and head, are all that their gradients need beside q, k, v."""


def _is_attention_kernel(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op._schema.name in _ATTENTION_KERNELS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _backward(y: Tensor, grad: Tensor, x: Tensor, trained: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients with respect to x and the trained matrices, None for what wants none."""
    sources = [source if source is not None and source.requires_grad else None for source in (x, *trained)]
    wanted = [source for source in sources if source is not None]
    found = iter(torch.autograd.grad(y, wanted, grad) if wanted else ())
    return [None if source is None else next(found) for source in sources]


class _RecomputedProjections(torch.autograd.Function):
    """Norm, q, k, v, rotation and attention; kept are x and what the attention kernel returned.

    Where attention is not one kernel (short samples in bf16 on a CPU) it is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: Block, context: Context, parts: Sequence[Projection], *trained: Tensor | None
    ) -> Tensor:
        keeping, giving_back = create_selective_checkpoint_contexts(_is_attention_kernel)  # type: ignore[no-untyped-call]
        ctx.save_for_backward(x)
        ctx.settings = block, context, parts, giving_back, torch.is_autocast_enabled(x.device.type), computing_dtype(x)
        with torch.enable_grad():  # without, some kernels leave out what their gradients need
            return attended(block, x.detach().requires_grad_(), context, parts, keeping).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        block, context, parts, giving_back, autocast, dtype = ctx.settings
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=autocast):
            o = attended(block, x, context, parts, giving_back)
        dx, *found = _backward(o, grads[0], x, trained_by(parts[:3]))
        return dx, None, None, None, *found


class _RecomputedBlock(torch.autograd.Function):
    """A whole block of which only x is kept. Its attention is run again in the backward pass, ``down`` never is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Block,
        context: Context,
        attention: Sequence[Projection],
        last: Sequence[Projection],
        *trained: Tensor | None,
    ) -> Tensor:
        dtype = computing_dtype(x)
        ctx.save_for_backward(x)
        ctx.settings = block, context, attention, last, dtype, torch.is_autocast_enabled(x.device.type)
        middle = _first_half(block, x, context, attention)
        norm = block.post_attention_layernorm
        with torch.autocast(x.device.type, enabled=False):
            starts = range(0, len(middle), TILE_TOKENS)
            for start, tile in zip(starts, tiles(middle), strict=True):
                tile.add_(feed_forward(tile, norm, last, dtype, start))
        return middle

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        block, context, attention, last, dtype, autocast = ctx.settings
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=autocast):
            middle = _first_half(block, x, context, attention)
        norm = block.post_attention_layernorm
        dmiddle, trained = feed_forward_gradients(grads[0], middle.detach(), norm, last, (), dtype)
        dx, *found = _backward(middle, dmiddle.add_(grads[0]), x, trained_by(attention))
        return dx, None, None, None, None, *found, *trained


def _first_half(block: Block, x: Tensor, context: Context, parts: Sequence[Projection]) -> Tensor:
    """x + attention(norm(x)), (N, D) -> (N or asked-for rows, D)."""
    rows = context.needed(x[None], block.self_attn.layer)[0]
    return rows + projected(attended(block, x, context, parts), parts[3])


def _attend(block: Block, recompute: bool, x: Tensor, context: Context) -> Tensor:
    row, parts = only_row(x), attention_parts(block)
    if recompute:
        o = _RecomputedProjections.apply(row, block, context, parts, *trained_by(parts[:3]))  # type: ignore[no-untyped-call]
    else:
        o = attended(block, row, context, parts)
    return projected(o, parts[3])[None]


def _feed_forward(block: Block, recompute: bool, x: Tensor) -> Tensor:
    return fed_forward(block, only_row(x), recompute)[None]


def _run_recomputed(block: Block, x: Tensor, context: Context) -> Tensor:
    first, last = attention_parts(block), feed_forward_parts(block)
    y = _RecomputedBlock.apply(only_row(x), block, context, first, last, *trained_by((*first, *last)))  # type: ignore[no-untyped-call]
    return y[None]  # type: ignore[no-any-return]


def apply_fused(block: Block, recompute: Recompute = Recompute.NOTHING) -> None:
    """Let a block of a LoRA model compute through hand-written functions: rows without padding, no cache."""
    if recompute is Recompute.BLOCK:
        block.run_block = _run_recomputed
        return
    block.attend = functools.partial(_attend, block, recompute >= Recompute.PROJECTIONS)  # type: ignore[method-assign]
    block.feed_forward = functools.partial(_feed_forward, block, recompute >= Recompute.FEED_FORWARD)  # type: ignore[method-assign]
