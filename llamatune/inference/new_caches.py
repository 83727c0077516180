"""Empty key-value caches for a model: of one row, in which beams stand, and of many rows."""

from __future__ import annotations

from llamatune.model.kv_cache import KVCache, RowCache
from llamatune.model.transformer import Transformer


def new_cache(model: Transformer, capacity: int) -> KVCache:
    """Of one row in the dtype that the model computes in; ``capacity`` in tokens."""
    return KVCache(model.config, capacity, model.product_dtype, model.device)


def new_rows(model: Transformer, rows: int) -> RowCache:
    """Of so many rows in the dtype that the model computes in."""
    return RowCache(model.config, rows, model.product_dtype, model.device)
