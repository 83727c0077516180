"""The lean block: a LoRA block that keeps little for the backward pass, and computes again as its level says.

Every level gives the same bits: dropout's seeds are drawn once, in the same order, and what is computed again is what
was computed before.
"""

from __future__ import annotations

from torch import Tensor

from llamatune.model.lean.halves import attended, attention_parts, fed_forward, feed_forward_parts, projected
from llamatune.model.lean.pieces import trained_by
from llamatune.model.lean.recomputed import RecomputedBlock, RecomputedProjections
from llamatune.model.transformer import Block, Context
from llamatune.shapes.levels import Recompute


class LeanBlock(Block):
    """A block of frozen weights and adapters, computed by hand-written functions: rows without padding, no cache."""

    def __init__(self, block: Block, recompute: Recompute = Recompute.NOTHING) -> None:
        self.take_layers_of(block)
        self.recompute = recompute

    def attend(self, x: Tensor, context: Context, rows: Tensor | None) -> Tensor:
        row, parts = _only_row(x), attention_parts(self)
        if self.recompute >= Recompute.PROJECTIONS:
            trained = trained_by(parts[:3])
            o = RecomputedProjections.apply(row, self, context, rows, parts, *trained)  # type: ignore[no-untyped-call]
        else:
            o = attended(self, row, context, rows, parts)
        return projected(o, parts[3])[None]

    def feed_forward(self, x: Tensor) -> Tensor:
        return fed_forward(self, _only_row(x), self.recompute >= Recompute.FEED_FORWARD)[None]

    def forward(self, x: Tensor, context: Context, rows: Tensor | None = None) -> Tensor:
        if self.recompute is not Recompute.BLOCK:
            return super().forward(x, context, rows)
        attention, last = attention_parts(self), feed_forward_parts(self)
        trained = trained_by((*attention, *last))
        y = RecomputedBlock.apply(_only_row(x), self, context, rows, attention, last, *trained)  # type: ignore[no-untyped-call]
        return y[None]  # type: ignore[no-any-return]


def _only_row(x: Tensor) -> Tensor:
    """(N, D) of (1, N, D): batches are rows without padding."""
    assert len(x) == 1, "a lean block takes one row of samples"
    return x[0]
