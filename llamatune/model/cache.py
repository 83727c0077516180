"""The key-value cache of generation."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatune.shapes.config import LlamaConfig


class KVCache:
    """Keys and values of the tokens seen so far, for inference only.

    ``update`` of a layer appends (B, K, T, E) and returns all of it, (B, K, S, E); ``length`` grows with the last one.
    """

    def __init__(
        self, config: LlamaConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, capacity, config.head_dim)
        self._stored = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + key.shape[2]
        keys, values = self._stored[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        if layer == len(self._stored) - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Let row i continue what row ``rows[i]`` held (beam search)."""
        self._stored = self._stored.index_select(2, rows)
