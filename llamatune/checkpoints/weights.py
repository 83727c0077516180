"""What a model's writer is given for each weight: a tensor, portions of its rows, or where a checkpoint stores it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from llamatune.formats.file_range import FileRange
from llamatune.formats.safetensors import TensorLocation
from llamatune.model.torch_dtypes import STORED_NAMES


@dataclass(frozen=True)
class StoredWeight:
    """A weight of a checkpoint: where its bytes lie, one part for each shard, and how to read it.

    ``rotated``: its rows are in Meta's order. ``portions`` gives its rows in order, in Hugging Face's layout, once.
    """

    parts: Sequence[TensorLocation]
    rotated: bool
    portions: Iterator[torch.Tensor]

    def copies(
        self, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], rotated: bool = False
    ) -> list[FileRange] | None:
        """The bytes of each shard where they are those that a writer of such shards would write, else None."""
        stored = STORED_NAMES[dtype]
        plain = all(part.strides is None and part.dtype == stored for part in self.parts)
        if not plain or rotated != self.rotated or [part.shape for part in self.parts] != list(shapes):
            return None
        return [FileRange(part.path, part.begin, part.end, part.crc) for part in self.parts]


Weight = torch.Tensor | StoredWeight | Iterable[torch.Tensor]
"""Portions of rows come in order, each on any device; those of q and k hold whole heads."""
WeightOf = Callable[[str], Weight]
"""Gives a weight by its Hugging Face name, in Hugging Face's layout."""
DtypeOf = Callable[[str], torch.dtype]


def portions_of(weight: Weight, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The rows of a weight in order, contiguous on the CPU in ``dtype``."""
    portions = weight.portions if isinstance(weight, StoredWeight) else weight
    for portion in [portions] if isinstance(portions, torch.Tensor) else portions:
        yield portion.detach().to("cpu", dtype).contiguous()
