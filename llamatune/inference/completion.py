"""What every way of decoding shares: its result, its cache, and the logits of the next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llamatune.model.kv_cache import KVCache, RowCache
from llamatune.model.layers import linear
from llamatune.model.transformer import Transformer


@dataclass(frozen=True)
class Completion:
    """New ids without the EOS; ``finish_reason`` is ``eos``, ``length``, or ``stop``: ``is_enough`` said so."""

    ids: list[int]
    finish_reason: str


def new_cache(model: Transformer, capacity: int) -> KVCache:
    """An empty cache of one row in the dtype that the model computes in; ``capacity`` in tokens."""
    return KVCache(model.config, capacity, _dtype(model), model.device)


def new_rows(model: Transformer, rows: int) -> RowCache:
    """An empty cache of so many rows in the dtype that the model computes in."""
    return RowCache(model.config, rows, _dtype(model), model.device)


def _dtype(model: Transformer) -> torch.dtype:
    return model.product_dtype


def last_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Logits of the last position alone, (B, T, D) -> (B, V); they may lie in memory column after column."""
    return linear(hidden[:, -1], head_weight, any_layout=True)


def logits_of_the_row(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """(1, rows, D) -> (rows, V); they may lie in memory column after column."""
    return linear(hidden[0], head_weight, any_layout=True)
