"""``Checkpoint``: a model on disk, read and written tensor by tensor under Hugging Face's names and in its layout."""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from llamatune.checkpoints.model_directory import Format
from llamatune.checkpoints.tensor_bytes import tensor_bytes
from llamatune.checkpoints.tensor_locations import TensorLocation, listed
from llamatune.errors import CheckpointError, EnvironmentFault
from llamatune.events import OnEvent
from llamatune.formats.manifest import Staging
from llamatune.model.torch_dtypes import STORED_WEIGHTS
from llamatune.safe_reading import open_regular
from llamatune.shapes.config import LlamaConfig

_PORTION_BYTES = 16 << 20
"""What is read at once of a tensor that is not one run of bytes."""


class Checkpoint(ABC):
    """A checked model directory: every tensor of ``config`` is there, in its shape, and nothing else is.

    A format is a subclass, which reads it, and a function beside it that writes a new directory (``write_huggingface``,
    ``write_meta``). ``names`` are those of ``config.parameter_shapes()``, in that order.
    """

    format: Format

    def __init__(self, path: Path, config: LlamaConfig) -> None:
        self.path, self.config = path, config
        self._shapes = dict(config.parameter_shapes())
        self._maps: dict[Path, mmap.mmap] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor; a tied head is none of its own."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor, of which a shard may hold a part."""
        return self._shapes[name]

    @abstractmethod
    def parts(self, name: str) -> Sequence[TensorLocation]:
        """Where the tensor is stored: one part, or one for each of Meta's shards."""

    @abstractmethod
    def tensor(self, name: str, mapped: bool = False) -> torch.Tensor:
        """The tensor in memory of its own; ``mapped``: in the page cache, where the layout on disk allows it."""

    @abstractmethod
    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix, (len(rows), in), or elements of a vector, without reading the others."""

    @abstractmethod
    def write_copy(
        self, staging: Staging, tensor_of: Callable[[str], torch.Tensor], dtype: torch.dtype | None, on_event: OnEvent
    ) -> None:
        """Write the model again with other tensors, in its own layout and with its own configuration and tokenizer.

        ``tensor_of`` gives each weight once; ``dtype`` is what all are cast to, None: each as it is stored.
        """

    def dtype(self, name: str) -> torch.dtype:
        """As location."""
        return STORED_WEIGHTS[self.parts(name)[0].dtype]

    def stored_bytes(self) -> int:
        """The size of all tensors on disk."""
        parts = (part for name in self.names for part in self.parts(name))
        return sum(math.prod(part.shape) * STORED_WEIGHTS[part.dtype].itemsize for part in parts)

    def _read(self, location: TensorLocation, mapped: bool = False) -> torch.Tensor:
        dtype, entry = STORED_WEIGHTS[location.dtype], location.entry
        if mapped and location.strides is None and entry.begin % dtype.itemsize == 0:
            # A private copy-on-write mapping: the file can never change through it.
            return torch.frombuffer(
                self._map(location.path), dtype=dtype, count=(entry.end - entry.begin) // dtype.itemsize,
                offset=entry.begin,
            ).view(entry.shape)  # fmt: skip
        tensor = torch.empty(entry.shape, dtype=dtype)
        self._fill(tensor, location)
        return tensor

    def _fill(self, into: torch.Tensor, location: TensorLocation) -> None:
        """Read into a CPU tensor of any layout; what is not one run of bytes on both sides comes in portions."""
        if location.strides is None and into.is_contiguous():
            read_into(location.path, location.entry.begin, into)
            return
        shape = location.shape
        strides = location.strides or torch.empty(shape, device="meta").stride()
        # Portions along the widest stride do not overlap in the file, so nothing is read twice.
        wide = max(range(len(shape)), key=lambda i: (shape[i] > 1, strides[i]))
        slice_extent = 1 + sum((n - 1) * s for i, (n, s) in enumerate(zip(shape, strides, strict=True)) if i != wide)
        at_once = max(1, _PORTION_BYTES // into.itemsize // strides[wide])
        for first in range(0, shape[wide], at_once):
            count = min(at_once, shape[wide] - first)
            portion = torch.empty((count - 1) * strides[wide] + slice_extent, dtype=into.dtype)
            read_into(location.path, location.entry.begin + first * strides[wide] * into.itemsize, portion)
            view = portion.as_strided([count if i == wide else n for i, n in enumerate(shape)], strides)
            into.narrow(wide, first, count).copy_(view)

    def _read_rows(self, location: TensorLocation, rows: Sequence[int]) -> torch.Tensor:
        if not location.rows_are_whole:
            return self._read(location)[list(rows)]
        dtype = STORED_WEIGHTS[location.dtype]
        data = bytearray(location.row_bytes(rows))
        return torch.frombuffer(data, dtype=dtype).view(-1, *location.shape[1:])

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with open_regular(path) as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


def read_into(path: Path, begin: int, tensor: torch.Tensor) -> None:
    """Fill a contiguous CPU tensor with the bytes of ``path`` from ``begin``."""
    view = tensor_bytes(tensor)
    with open_regular(path) as file:
        try:
            file.seek(begin)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError("became shorter while it was read", path, "do not replace files in use")
                view = view[count:]
        except OSError as fault:
            raise EnvironmentFault(f"cannot read: {fault.strerror}", path) from None


def refuse_unfit(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
    dtypes: Mapping[str, str] | None = None,
    todo: str = "configuration and weights must be of the same model",
) -> None:
    """Raise one line that names the missing, unexpected and misshapen tensors, if there are any."""
    missing = [name for name in expected if name not in found]
    surplus = sorted(set(found) - set(expected) - set(ignored))
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    foreign = [f"{name} {dtype}" for name, dtype in (dtypes or {}).items() if dtype not in STORED_WEIGHTS]
    faults = [
        f"{what}: {listed(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", surplus),
            ("wrong shape", misshapen),
            ("neither float32, bfloat16 nor float16", foreign),
        )
        if names
    ]
    if faults:
        raise CheckpointError(f"the tensors do not fit the configuration ({'; '.join(faults)})", path, todo)
