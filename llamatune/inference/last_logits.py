"""Logits of the next token: of the last position of each sequence, or of the rows that a pass reads."""

from __future__ import annotations

from torch import Tensor

from llamatune.model.layers import linear


def last_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Logits of the last position alone, (B, T, D) -> (B, V); they may lie in memory column after column."""
    return linear(hidden[:, -1], head_weight, any_layout=True)


def logits_of_the_row(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """(1, rows, D) -> (rows, V); they may lie in memory column after column."""
    return linear(hidden[0], head_weight, any_layout=True)
