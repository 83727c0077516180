"""Activation checkpointing (Chen et al. 2016): which block computes what again in the backward pass.

LoRA blocks are replaced by fused blocks, whose levels recompute no more than their gradients need. Plain blocks are run
again by torch's checkpointing, as a whole or by halves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llamatune.model.fused.block import FusedBlock
from llamatune.model.fused.operations import Projection
from llamatune.model.transformer import Block, Context, Transformer
from llamatune.shapes.recompute_levels import ATTENTION_MODES, FEED_FORWARD_MODES, Levels, is_whole, levels_of

# The reentrant kind gives no gradient, or a part of it, when the block's input needs none.
_recompute: Callable[..., Tensor] = functools.partial(checkpoint, use_reentrant=False)


class CheckpointedBlock(Block):
    """A plain block that torch's checkpointing runs again: all of it, or its halves, norms included."""

    def __init__(self, block: Block, whole: bool, attention: bool, feed_forward: bool) -> None:
        self.take_layers_of(block)
        self.whole, self.again_attention, self.again_feed_forward = whole, attention, feed_forward

    def attend(self, x: Tensor, context: Context, rows: Tensor | None) -> Tensor:
        attend = super().attend
        return _recompute(attend, x, context, rows) if self.again_attention else attend(x, context, rows)

    def feed_forward(self, x: Tensor) -> Tensor:
        feed_forward = super().feed_forward
        return _recompute(feed_forward, x) if self.again_feed_forward else feed_forward(x)

    def forward(self, x: Tensor, context: Context, rows: Tensor | None = None) -> Tensor:
        forward = super().forward
        return _recompute(forward, x, context, rows) if self.whole else forward(x, context, rows)


class CheckpointedFusedBlock(FusedBlock):
    """A fused block whose attention half torch's checkpointing runs again."""

    def attention_half(self, context: Context, rows: Tensor | None, parts: Sequence[Projection], x: Tensor) -> Tensor:
        return _recompute(super().attention_half, context, rows, parts, x)


def apply_activation_checkpointing(model: Transformer, mode: str, fused: bool, levels: Levels | None = None) -> None:
    """Replace the blocks of ``model`` by ones that recompute as ``mode`` says.

    Args:
        mode: one of ``shapes.recompute_levels.MODES``.
        fused: fused blocks, at ``levels`` if they are given, else at those of ``mode``.
    """
    blocks, attention, feed_forward = model.model.layers, mode in ATTENTION_MODES, mode in FEED_FORWARD_MODES
    levels = levels_of(mode, len(blocks)) if levels is None else levels
    for index, block in enumerate(blocks):
        assert isinstance(block, Block)
        if fused:
            kind = CheckpointedFusedBlock if attention else FusedBlock
            blocks[index] = kind(block, levels[index])
        elif mode != "none":
            blocks[index] = CheckpointedBlock(block, is_whole(mode, index), attention, feed_forward)
