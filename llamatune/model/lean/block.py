"""The lean block: a LoRA block that keeps little for the backward pass, and computes again as its level says.

Every level gives the same bits: dropout's seeds are drawn once, in the same order, and what is computed again is what
was computed before.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from llamatune.model.lean.halves import LeanFeedForward, attended, projected, projections
from llamatune.model.lean.pieces import trained_by
from llamatune.model.lean.recomputed import RecomputedBlock, RecomputedProjections, first_half
from llamatune.model.transformer import Block, Context
from llamatune.shapes.levels import Recompute


class LeanBlock(Block):
    """A block of frozen weights and adapters, computed by hand-written functions: rows without padding, no cache."""

    def __init__(self, block: Block, recompute: Recompute = Recompute.NOTHING) -> None:
        self.take_layers_of(block)
        self.recompute = recompute

    def attend(self, x: Tensor, context: Context, rows: Tensor | None) -> Tensor:
        parts = projections(self.self_attn)
        run = partial(attended, self, context, rows, parts)
        if self.recompute >= Recompute.PROJECTIONS:
            inputs = parts[:3]
            o = RecomputedProjections.apply(_only_row(x), run, inputs, *trained_by(inputs))  # type: ignore[no-untyped-call]
        else:
            o = run(_only_row(x))
        return projected(o, parts[3])[None]

    def feed_forward(self, x: Tensor) -> Tensor:
        norm, parts, recompute = self.post_attention_layernorm, projections(self.mlp), self.recompute
        y = LeanFeedForward.apply(  # type: ignore[no-untyped-call]
            _only_row(x), norm, parts, recompute >= Recompute.FEED_FORWARD, *trained_by(parts)
        )
        return y[None]  # type: ignore[no-any-return]

    def forward(self, x: Tensor, context: Context, rows: Tensor | None = None) -> Tensor:
        if self.recompute is not Recompute.BLOCK:
            return super().forward(x, context, rows)
        first, last = projections(self.self_attn), projections(self.mlp)
        run_first = partial(first_half, self, context, rows, first)
        y = RecomputedBlock.apply(  # type: ignore[no-untyped-call]
            _only_row(x), run_first, self.post_attention_layernorm, first, last, *trained_by((*first, *last))
        )
        return y[None]  # type: ignore[no-any-return]


def _only_row(x: Tensor) -> Tensor:
    """(N, D) of (1, N, D): batches are rows without padding."""
    assert len(x) == 1, "a lean block takes one row of samples"
    return x[0]
