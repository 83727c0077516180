"""The key-value cache of generation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llamatune.shapes.llama_config import LlamaConfig

_FIRST_ROOM_TOKENS = 256


class KVCache:
    """Keys and values of the tokens seen so far, for inference only.

    ``update`` of a layer appends (B, K, T, E) and returns all of it, (B, K, S, E); ``length`` grows with the last one.
    Room doubles as it is used up, up to ``capacity`` tokens, and a layer at a time, so that little is held twice.
    """

    def __init__(
        self, config: LlamaConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._capacity, self._layers = capacity, config.num_hidden_layers
        shape = (2, batch, config.num_key_value_heads, 0, config.head_dim)
        self._stored = [torch.empty(shape, dtype=dtype, device=device) for _ in range(self._layers)]
        self.length = 0

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + key.shape[2]
        if end > self._stored[layer].shape[3]:
            self._stored[layer] = self._with_room(self._stored[layer], end)
        keys, values = self._stored[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        if layer == self._layers - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def _with_room(self, stored: Tensor, tokens: int) -> Tensor:
        room = max(tokens, min(self._capacity, max(2 * tokens, _FIRST_ROOM_TOKENS)))
        grown = stored.new_empty((*stored.shape[:3], room, stored.shape[4]))
        grown[:, :, :, : self.length] = stored[:, :, :, : self.length]
        return grown

    def has_room(self, tokens: int) -> bool:
        """Whether so many more tokens fit without growth."""
        return self.length + tokens <= self._stored[-1].shape[3]

    def keep_rows(self, rows: Sequence[int], first: int = 0) -> None:
        """Keep only these rows of the batch, and of them the tokens from place ``first`` on."""
        kept = torch.tensor(rows, device=self._stored[0].device)
        for layer, stored in enumerate(self._stored):
            self._stored[layer] = stored[:, kept, :, first : self.length]
        self.length -= first

    def keep_places(self, places: Tensor) -> None:
        """Keep only the tokens at ``places`` (N,), in every row and in this order."""
        for layer, stored in enumerate(self._stored):
            self._stored[layer] = stored[:, :, :, places]
        self.length = len(places)
