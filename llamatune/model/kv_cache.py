"""Key-value caches of generation: of many sequences of their own lengths, and of one that grows by any tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from llamatune.model.rows_by_length import KEYS_TO_SAVE, Groups, groups_of_rows
from llamatune.shapes.generation_sizes import grown_room
from llamatune.shapes.llama_config import LlamaConfig


class LayerCache(Protocol):
    """What attention asks of a cache: ``update`` takes a layer's new keys and values (B, K, T, E) and returns all that
    the queries may see, (B, K, S, E). ``length``: the tokens before the new ones, of each row alike. ``groups``: rows
    with the keys of the longest of each; the pass has a mask then. Without groups all see S."""

    length: int
    groups: Groups

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]: ...


class RowCache:
    """Keys and values of up to ``rows`` sequences; those in use are the first ones, without a gap.

    Room grows for all rows, doubling, as the longest needs it, up to ``capacity`` tokens, which may be raised; a layer
    at a time, so that little is held twice.
    """

    def __init__(self, config: LlamaConfig, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self._layers, self._window, self.rows = config.num_hidden_layers, config.sliding_window, rows
        shape = (2, rows, config.num_key_value_heads, 0, config.head_dim)
        self._stored = [torch.empty(shape, dtype=dtype, device=device) for _ in range(self._layers)]
        self._least_saved = max(1, KEYS_TO_SAVE // (config.num_key_value_heads * config.head_dim))
        self.lengths: list[int] = []
        self.capacity = 0

    def begin(self, lengths: Sequence[int], to_come: int = 0) -> LayerCache:
        """For one pass over as many new sequences, which stand one after another in one row of the batch.

        What follows them in that row is not kept. There is room for so many tokens that are ``to_come`` of each.
        """
        first = len(self.lengths)
        self.lengths += lengths
        new = _NewRows(self, first, to_come)
        if not self.room:  # all at once: what stays would lie between what each layer makes and frees
            for layer in range(self._layers):
                self.layer(layer, 0, new.needed)
        return new

    def continue_last(self, tokens: int) -> LayerCache:
        """For one pass over so many further tokens of the last sequence, which is the only row of the batch."""
        self.lengths[-1] += tokens
        return _LastRow(self, tokens)

    def shorten_last(self, tokens: int) -> None:
        """Forget the last tokens of the last sequence, so many."""
        self.lengths[-1] -= tokens

    def next_token(self, places: Tensor) -> tuple[LayerCache, Tensor | None]:
        """For one pass over a further token of every sequence, and its mask (rows, 1, 1, S); None: all is seen.

        ``places`` (rows,): the lengths so far, on the device.
        """
        self.go_on()
        rows, longest = len(self.lengths), max(self.lengths)
        outside = self._window is not None and longest > self._window
        if min(self.lengths) == longest and not outside:
            return _FirstRows(self, None, rows, longest), None
        return _FirstRows(self, places, rows, longest, self._groups()), self._mask(places, longest)

    def _groups(self) -> Groups:
        """A GPU has one: its steps take long to launch, or are captured with all rows. Measured without AMX."""
        if self._stored[0].is_cuda:
            return [(len(self.lengths), max(self.lengths))]
        return groups_of_rows(self.lengths, self._least_saved)

    def fixed_step(self, places: Tensor) -> tuple[LayerCache, Tensor]:
        """For passes over a further token of the first rows, at ``places`` (rows,), and their mask (rows, 1, 1, room).

        A row sees its whole room through the mask, so that shapes and addresses stay what they are until the room
        grows. Rows that are not in use may be among them. The tokens are counted by ``go_on``.
        """
        return _FirstRows(self, places, len(places), self.room), self._mask(places, self.room)

    def go_on(self) -> None:
        """Count a further token of every sequence."""
        self.lengths = [length + 1 for length in self.lengths]

    @property
    def room(self) -> int:
        """Tokens that each row has room for."""
        return self._stored[-1].shape[3]

    @property
    def has_room(self) -> bool:
        """Whether every sequence can go on by a token without growth."""
        return max(self.lengths) < self.room

    def grow(self) -> None:
        """Make room for a further token of every sequence, in all layers."""
        longest = max(self.lengths)
        for layer in range(self._layers):
            self.layer(layer, longest, longest + 1)

    def _mask(self, places: Tensor, keys: int) -> Tensor:
        """(rows, 1, 1, keys): what the tokens at ``places`` (rows,) see."""
        places, of_keys = places[:, None], torch.arange(keys, device=places.device)
        seen = of_keys <= places
        if self._window is not None and keys > self._window:
            seen &= of_keys > places - self._window
        return seen[:, None, None]

    def drop(self, rows: Sequence[int]) -> list[int]:
        """Give up ``rows``. Returns where each row that stays came from.

        The last row of a group takes a place that is free in it, and the last of the next group that row's: the groups
        stay, and few rows move.
        """
        origin = list(range(len(self.lengths)))
        ends = list(accumulate(count for count, _ in self._groups()))
        for free in sorted(rows, reverse=True):
            for group, end in enumerate(ends):
                if end > free:
                    origin[free] = origin[end - 1]
                    free, ends[group] = end - 1, end - 1
            del origin[-1]
        for place, row in enumerate(origin):  # a row moves to an earlier place, so none is overwritten before it moves
            if place != row:
                for stored in self._stored:
                    stored[:, place, :, : self.lengths[row]] = stored[:, row, :, : self.lengths[row]]
        self.lengths = [self.lengths[row] for row in origin]
        return origin

    def layer(self, layer: int, held: int, needed: int | None = None) -> Tensor:
        """(2, rows, K, room, E) with room for all lengths, or for ``needed`` tokens.

        ``held``: the longest that is kept if it has to grow.
        """
        stored, needed = self._stored[layer], needed or max(self.lengths)
        if needed > stored.shape[3]:
            room = grown_room(needed, self.capacity)
            # Zeros, since what a mask hides still takes part, with a weight of 0, which must not meet NaN.
            grown = stored.new_zeros((*stored.shape[:3], room, stored.shape[4]))
            grown[:, :, :, :held] = stored[:, :, :, :held]
            self._stored[layer] = stored = grown
        return stored


class _NewRows:
    """New sequences from row ``first`` on, one after another in the pass."""

    groups: Groups = ()

    def __init__(self, cache: RowCache, first: int, to_come: int) -> None:
        self._cache, self._first, self.length = cache, first, 0
        self._held = max(cache.lengths[:first], default=0)
        self.needed = max(*cache.lengths[:first], *(length + to_come for length in cache.lengths[first:]), 0)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.layer(layer, self._held, self.needed)
        begin = 0
        for row, length in enumerate(self._cache.lengths[self._first :], self._first):
            keys[row, :, :length] = key[0, :, begin : begin + length]
            values[row, :, :length] = value[0, :, begin : begin + length]
            begin += length
        return key, value


class _LastRow:
    """The last sequence goes on by several tokens."""

    groups: Groups = ()

    def __init__(self, cache: RowCache, tokens: int) -> None:
        self._cache, self.length = cache, cache.lengths[-1] - tokens
        self._held = max([*cache.lengths[:-1], self.length])

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        row, end = len(self._cache.lengths) - 1, self._cache.lengths[-1]
        keys, values = self._cache.layer(layer, self._held)[:, row : row + 1, :, :end]
        keys[:, :, self.length :] = key
        values[:, :, self.length :] = value
        return keys, values


class _FirstRows:
    """The first ``rows`` go on by a token, at ``places`` (rows,), and see ``keys`` places; None: all at the last."""

    def __init__(self, cache: RowCache, places: Tensor | None, rows: int, keys: int, groups: Groups = ()) -> None:
        self._cache, self._places, self._count, self.length = cache, places, rows, keys - 1
        self.groups = groups if len(groups) > 1 else ()
        self._rows = None if places is None else torch.arange(rows, device=places.device)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._cache.layer(layer, self.length)[:, : self._count, :, : self.length + 1]
        if self._places is None:
            keys[:, :, self.length] = key[:, :, 0]
            values[:, :, self.length] = value[:, :, 0]
        else:
            keys[self._rows, :, self._places] = key[:, :, 0]
            values[self._rows, :, self._places] = value[:, :, 0]
        return keys, values


class KVCache:
    """Keys and values of the tokens in one row, in which several beams stand (a ``LayerCache``).

    ``update`` of a layer appends (1, K, T, E) and returns all of it, (1, K, S, E); ``length`` grows with the last one.
    Room doubles as it is used up, up to ``capacity`` tokens, and a layer at a time, so that little is held twice.
    """

    groups: Groups = ()

    def __init__(self, config: LlamaConfig, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self._capacity, self._layers = capacity, config.num_hidden_layers
        shape = (2, 1, config.num_key_value_heads, 0, config.head_dim)
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
        room = grown_room(tokens, self._capacity)
        grown = stored.new_empty((*stored.shape[:3], room, stored.shape[4]))
        grown[:, :, :, : self.length] = stored[:, :, :, : self.length]
        return grown

    def has_room(self, tokens: int) -> bool:
        """Whether so many more tokens fit without growth."""
        return self.length + tokens <= self._stored[-1].shape[3]

    def keep_places(self, places: Tensor) -> None:
        """Keep only the tokens at ``places`` (N,), in this order."""
        for layer, stored in enumerate(self._stored):
            self._stored[layer] = stored[:, :, :, places]
        self.length = len(places)
