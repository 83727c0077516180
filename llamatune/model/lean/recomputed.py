"""Autograd functions that compute a part of a lean block again in the backward pass: its projections, or all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from llamatune.model.lean.halves import (
    attended,
    computing_dtype,
    feed_forward,
    feed_forward_gradients,
    projected,
)
from llamatune.model.lean.pieces import Projection, tiles, trained_by
from llamatune.model.transformer import Block, Context, select_rows
from llamatune.shapes import limits

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


def _backward(y: Tensor, grad: Tensor, x: Tensor, trained: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients with respect to x and the trained tensors, None for what wants none."""
    sources = (x, *trained)
    wanted = [source for source in sources if source.requires_grad]
    gradients = iter(torch.autograd.grad(y, wanted, grad) if wanted else ())
    return [next(gradients) if source.requires_grad else None for source in sources]


class RecomputedProjections(torch.autograd.Function):
    """Norm, q, k, v, rotation and attention; kept are x and what the attention kernel returned.

    Where attention is not one kernel (short samples in bf16 on a CPU) it is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Block,
        context: Context,
        rows: Tensor | None,
        parts: Sequence[Projection],
        *trained: Tensor,
    ) -> Tensor:
        keeping, giving_back = create_selective_checkpoint_contexts(_is_attention_kernel)  # type: ignore[no-untyped-call]
        autocast = torch.is_autocast_enabled(x.device.type)
        ctx.save_for_backward(x)
        ctx.settings = block, context, rows, parts, giving_back, autocast, computing_dtype(x)
        with torch.enable_grad():  # without, some kernels leave out what their gradients need
            return attended(block, x.detach().requires_grad_(), context, rows, parts, keeping).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        block, context, rows, parts, giving_back, autocast, dtype = ctx.settings
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=autocast):
            o = attended(block, x, context, rows, parts, giving_back)
        dx, *trained = _backward(o, grads[0], x, trained_by(parts[:3]))
        return dx, None, None, None, None, *trained


class RecomputedBlock(torch.autograd.Function):
    """A whole block of which only x is kept. Its attention is run again in the backward pass, ``down`` never is."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Block,
        context: Context,
        rows: Tensor | None,
        attention: Sequence[Projection],
        last: Sequence[Projection],
        *trained: Tensor,
    ) -> Tensor:
        dtype = computing_dtype(x)
        ctx.save_for_backward(x)
        ctx.settings = block, context, rows, attention, last, dtype, torch.is_autocast_enabled(x.device.type)
        middle = _first_half(block, x, context, rows, attention)
        norm = block.post_attention_layernorm
        with torch.autocast(x.device.type, enabled=False):
            starts = range(0, len(middle), limits.TILE_TOKENS)
            for start, tile in zip(starts, tiles(middle), strict=True):
                tile.add_(feed_forward(tile, norm, last, dtype, start))
        return middle

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        block, context, rows, attention, last, dtype, autocast = ctx.settings
        x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad(), torch.autocast(x.device.type, dtype, enabled=autocast):
            middle = _first_half(block, x, context, rows, attention)
        norm = block.post_attention_layernorm
        dmiddle, trained_last = feed_forward_gradients(grads[0], middle.detach(), norm, last, (), dtype)
        dx, *trained_first = _backward(middle, dmiddle.add_(grads[0]), x, trained_by(attention))
        return dx, None, None, None, None, None, *trained_first, *trained_last


def _first_half(block: Block, x: Tensor, context: Context, rows: Tensor | None, parts: Sequence[Projection]) -> Tensor:
    """x + attention(norm(x)), (N, D) -> (N or len(rows), D)."""
    return select_rows(x[None], rows)[0] + projected(attended(block, x, context, rows, parts), parts[3])
