"""Which elements of a trained parameter a rank holds where full fine-tuning runs on several ranks. No torch.

A parameter is cut along its rows, as torch's ``fully_shard`` does: each rank has ``ceil(rows / ranks)`` of them, the
last ranks fewer or none. So a slice is one run of the flattened tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """The slice of a rank: of the ``whole`` elements of a parameter each rank has ``most``, or what is left."""

    rank: int
    most: int
    whole: int

    @classmethod
    def of(cls, shape: Sequence[int], rank: int = 0, ranks: int = 1) -> Shard:
        """The slice that ``rank`` has of a parameter of ``shape``."""
        row = math.prod(shape[1:])
        return cls(rank, -(-shape[0] // ranks) * row, shape[0] * row)

    def on(self, rank: int) -> Shard:
        """The slice of another rank."""
        return Shard(rank, self.most, self.whole)

    @property
    def begin(self) -> int:
        return min(self.whole, self.most * self.rank)

    @property
    def end(self) -> int:
        return min(self.whole, self.most * (self.rank + 1))

    def __len__(self) -> int:
        return self.end - self.begin

    def held_blocks(self, size: int) -> range:
        """The blocks of ``size`` elements of the parameter that have an element here."""
        return range(self.begin // size, -(-self.end // size) if len(self) else self.begin // size)

    def owned_blocks(self, size: int) -> range:
        """Those whose first element is here: each block belongs to one rank."""
        return range(-(-self.begin // size), -(-self.end // size))
