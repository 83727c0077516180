"""The fused block: a LoRA block that keeps little for the backward pass, and computes again as its level says.

Every level gives the same bits: dropout's seeds are drawn once, in the same order, and what is computed again is what
was computed before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from llamatune.model import attention_in_fp32
from llamatune.model.fused.attention_and_feed_forward import (
    FusedFeedForward,
    attended,
    feed_forward,
    feed_forward_gradients,
    projected,
)
from llamatune.model.fused.operations import Projection, projections, tiles, trained_by
from llamatune.model.layers import RMSNorm, product_dtype
from llamatune.model.transformer import Block, Context, select_rows
from llamatune.shapes.recompute_levels import Recompute

_ATTENTION_KERNELS = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    attention_in_fp32.NAME,
}
"""Their outputs, one row and one number for each token and head, are all that their gradients need beside q, k, v."""


def _is_attention_kernel(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = op._schema.name in _ATTENTION_KERNELS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _remember(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], *settings: Any) -> None:
    """Keep x alone, and what ``_run_again`` and the backward pass need to know."""
    ctx.save_for_backward(x)
    ctx.run, ctx.settings = run, settings
    ctx.dtype, ctx.autocast = product_dtype(x), torch.is_autocast_enabled(x.device.type)


def _run_again(ctx: Any) -> tuple[Tensor, Tensor]:
    """x as a leaf, and the part of the block that starts at it, run under the autocast of the forward pass."""
    x = ctx.saved_tensors[0].detach().requires_grad_(ctx.needs_input_grad[0])
    with torch.enable_grad(), torch.autocast(x.device.type, ctx.dtype, enabled=ctx.autocast):
        return x, ctx.run(x)


def _backward(y: Tensor, grad: Tensor, x: Tensor, parts: Sequence[Projection]) -> list[Tensor | None]:
    """Gradients with respect to x and the trained tensors of ``parts``, None for what wants none."""
    sources = (x, *trained_by(parts))
    wanted = [source for source in sources if source.requires_grad]
    gradients = iter(torch.autograd.grad(y, wanted, grad) if wanted else ())
    return [next(gradients) if source.requires_grad else None for source in sources]


class _RecomputedProjections(torch.autograd.Function):
    """``attended`` of which x and what the attention kernel returned are kept; ``parts`` are q, k and v."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Callable[..., Tensor], parts: Sequence[Projection], *trained: Tensor
    ) -> Tensor:
        keeping, giving_back = create_selective_checkpoint_contexts(_is_attention_kernel)  # type: ignore[no-untyped-call]
        _remember(ctx, x, partial(run, around=giving_back), parts)
        with torch.enable_grad():  # without, some kernels leave out what their gradients need
            return run(x.detach().requires_grad_(), around=keeping).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, o = _run_again(ctx)
        dx, *trained = _backward(o, grads[0], x, *ctx.settings)
        return dx, None, None, *trained


class _RecomputedBlock(torch.autograd.Function):
    """A whole block of which only x is kept. Its attention is run again in the backward pass, ``down`` never is."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run_first: Callable[[Tensor], Tensor], norm: RMSNorm,
        first: Sequence[Projection], last: Sequence[Projection], *trained: Tensor,
    ) -> Tensor:  # fmt: skip
        _remember(ctx, x, run_first, norm, first, last)
        middle = run_first(x)
        with torch.autocast(x.device.type, enabled=False):
            for row, tile in tiles(0, middle):
                feed_forward(tile, norm, last, ctx.dtype, row, out=tile)
        return middle

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        norm, first, last = ctx.settings
        x, middle = _run_again(ctx)
        dmiddle, trained_last = feed_forward_gradients(grads[0], middle.detach(), norm, last, (), ctx.dtype)
        dx, *trained_first = _backward(middle, dmiddle, x, first)
        return dx, None, None, None, None, *trained_first, *trained_last


class FusedBlock(Block):
    """A block of frozen weights and adapters, computed by hand-written functions: rows without padding, no cache."""

    def __init__(self, block: Block, recompute: Recompute = Recompute.NOTHING) -> None:
        self.take_layers_of(block)
        self.recompute = recompute

    def forward(self, x: Tensor, context: Context, rows: Tensor | None = None) -> Tensor:
        first, last, norm = projections(self.self_attn), projections(self.mlp), self.post_attention_layernorm
        run = partial(self.attention_half, context, rows, first)
        if self.recompute is Recompute.BLOCK:
            y = _RecomputedBlock.apply(_only_row(x), run, norm, first, last, *trained_by((*first, *last)))  # type: ignore[no-untyped-call]
        else:
            recompute = self.recompute >= Recompute.FEED_FORWARD
            y = FusedFeedForward.apply(run(_only_row(x)), norm, last, recompute, *trained_by(last))  # type: ignore[no-untyped-call]
        return y[None]  # type: ignore[no-any-return]

    def attention_half(self, context: Context, rows: Tensor | None, parts: Sequence[Projection], x: Tensor) -> Tensor:
        """x + attention of its norm, (N, D) -> (N or len(rows), D)."""
        run, inputs = partial(attended, self, context, rows, parts), parts[:3]
        if self.recompute is Recompute.PROJECTIONS:
            o = _RecomputedProjections.apply(x, run, inputs, *trained_by(inputs))  # type: ignore[no-untyped-call]
        else:
            o = run(x)
        return projected(o, parts[3], select_rows(x[None], rows).squeeze(0))


def _only_row(x: Tensor) -> Tensor:
    """(N, D) of (1, N, D): batches are rows without padding."""
    assert len(x) == 1, "a fused block takes one row of samples"
    return x.squeeze(0)  # the gradient of x[0] would be filled with zeros and copied
