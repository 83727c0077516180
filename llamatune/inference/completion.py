"""What every way of decoding shares: its result, its cache, and the logits of the next token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llamatune.model.kv_cache import KVCache
from llamatune.model.layers import linear
from llamatune.model.transformer import Transformer


@dataclass(frozen=True)
class Completion:
    """New ids without the EOS; ``finish_reason`` is ``eos``, ``length``, or ``stop``: ``is_enough`` said so."""

    ids: list[int]
    finish_reason: str


def new_cache(model: Transformer, batch: int, capacity: int) -> KVCache:
    """An empty cache in the dtype that the model computes in; ``capacity`` in tokens."""
    dtype = model.activation_dtype or model.model.embed_tokens.weight.dtype
    return KVCache(model.config, batch, capacity, dtype, model.device)


def last_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Logits of the last position alone, (B, T, D) -> (B, V)."""
    return linear(hidden[:, -1], head_weight)
