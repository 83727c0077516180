"""``Checkpoint``: a model on disk, read and written tensor by tensor under Hugging Face's names and in its layout."""

from __future__ import annotations

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from llamatune.checkpoints.huggingface_files import list_faults
from llamatune.checkpoints.model_directory import Format
from llamatune.checkpoints.tensor_bytes import tensor_bytes
from llamatune.checkpoints.weights import StoredWeight, Weight, WeightOf
from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent
from llamatune.formats.manifest import Staging
from llamatune.formats.safetensors import TensorLocation
from llamatune.model.torch_dtypes import STORED_NAMES, STORED_WEIGHTS
from llamatune.safe_reading import open_regular, read_faults
from llamatune.shapes.llama_config import LlamaConfig

_PORTION_BYTES = 16 << 20
"""What is read at once of a tensor that is not one run of bytes."""

WIDE = "F64"
"""What is read as fp32."""
READ_WEIGHTS = {**STORED_WEIGHTS, WIDE: torch.float64}

PORTION_WEIGHTS = 1 << 19
"""Of a matrix that is read in portions."""


class Checkpoint(ABC):
    """A checked model directory: every tensor of ``config`` is there, in its shape, and nothing else is.

    A format is a subclass, which reads it, and a function beside it that writes a new directory (``write_huggingface``,
    ``write_meta``). ``shapes`` are those of ``config.parameter_shapes()``, in that order: a tied head is none of its
    own. ``parts`` say where each tensor is stored: in one part, or in one for each of Meta's shards.
    """

    format: Format

    def __init__(self, path: Path, config: LlamaConfig, parts: Mapping[str, Sequence[TensorLocation]]) -> None:
        self.path, self.config, self.parts = path, config, parts
        self.shapes = dict(config.parameter_shapes())
        self._maps: dict[Path, mmap.mmap] = {}

    def is_made(self, name: str) -> bool:
        """Whether a weight is computed when it is read, its rows in fp32 whatever its dtype."""
        return False

    def stored(self, name: str) -> Weight:
        """A weight that is read when it is written somewhere else, if its bytes cannot be copied."""
        read = self.row_reader(name)
        portions = (read(rows) for rows in self.row_portions(name))
        return StoredWeight(self.parts[name], self.is_rotated(name), portions)

    def is_rotated(self, name: str) -> bool:
        """Whether its rows are stored in Meta's order."""
        return False

    def row_portions(self, name: str) -> Iterator[slice]:
        """A matrix cut into runs of rows, in order; those of q and k are whole heads, within which formats differ."""
        rows, *others = self.shapes[name]
        heads = self.config.head_dim if name.endswith(("q_proj.weight", "k_proj.weight")) else 1
        step = heads * max(1, PORTION_WEIGHTS // (heads * math.prod(others)))
        return (slice(first, min(first + step, rows)) for first in range(0, rows, step))

    def row_reader(self, name: str) -> Callable[[slice], torch.Tensor]:
        """Reads runs of a weight's rows, which ``row_portions`` gives, in memory of their own."""
        return self._row_reader(self.parts[name][0])

    def _row_reader(self, part: TensorLocation) -> Callable[[slice], torch.Tensor]:
        if part.strides is not None and part.strides[1:] not in ((), (1,)):
            whole = self._read(part)  # a transposed view: no row is one run of bytes
            return lambda rows: whole[rows]
        return lambda rows: self._read(part.rows(rows.start, rows.stop - rows.start))

    def tensor(self, name: str, mapped: bool = False) -> torch.Tensor:
        """The tensor in memory of its own; ``mapped``: in the page cache, where the layout on disk allows it."""
        return self._read(self.parts[name][0], mapped)

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix, (len(rows), in), or elements of a vector, without reading the others."""
        return self._read_rows(self.parts[name][0], rows)

    @abstractmethod
    def write_copy(self, staging: Staging, weight_of: WeightOf, dtype: torch.dtype | None, on_event: OnEvent) -> None:
        """Write the model again with other tensors, in its own layout and with its own configuration and tokenizer.

        ``weight_of`` is asked for each weight once; ``dtype`` is what all are cast to, None: each as it is stored.
        """

    def dtype(self, name: str) -> torch.dtype:
        """As stored; fp32 of what is stored in fp64."""
        return STORED_WEIGHTS.get(self.parts[name][0].dtype, torch.float32)

    def _read(self, part: TensorLocation, mapped: bool = False) -> torch.Tensor:
        dtype = STORED_WEIGHTS.get(part.dtype, torch.float32)
        if mapped and part.dtype != WIDE and part.strides is None and part.begin % dtype.itemsize == 0:
            # A private copy-on-write mapping: the file can never change through it.
            count = (part.end - part.begin) // dtype.itemsize
            return torch.frombuffer(self._map(part.path), dtype=dtype, count=count, offset=part.begin).view(part.shape)
        tensor = torch.empty(part.shape, dtype=dtype)
        fill_from(tensor, part)
        return tensor

    def _read_rows(self, part: TensorLocation, rows: Sequence[int]) -> torch.Tensor:
        dtype, shape, strides = READ_WEIGHTS[part.dtype], part.shape, part.strides
        if strides is not None and shape[1:] not in ((), (1,)) and strides[1:] != (1,):
            return self._read(part)[list(rows)]  # a transposed view: no row is one run of bytes
        size = dtype.itemsize * math.prod(shape[1:])
        step = size if strides is None else dtype.itemsize * strides[0]
        data = bytearray()
        with open_regular(part.path) as file:
            for row in rows:
                file.seek(part.begin + row * step)
                data += file.read(size)
        found = torch.frombuffer(data, dtype=dtype).view(-1, *shape[1:])
        return found.to(STORED_WEIGHTS.get(part.dtype, torch.float32))

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with open_regular(path) as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


def read_into(path: Path, begin: int, tensor: torch.Tensor) -> None:
    """Fill a contiguous CPU tensor with the bytes of ``path`` from ``begin``."""
    view = tensor_bytes(tensor)
    with open_regular(path) as file, read_faults(path):
        file.seek(begin)
        while view:
            count = file.readinto(view)
            if not count:
                raise CheckpointError("became shorter while it was read", path, "do not replace files in use")
            view = view[count:]


def fill_from(into: torch.Tensor, part: TensorLocation) -> None:
    """Read into a CPU tensor of any layout; what is not one run of bytes on both sides comes in portions."""
    if part.dtype == WIDE != STORED_NAMES[into.dtype]:
        stored = torch.empty(part.shape, dtype=READ_WEIGHTS[WIDE])
        fill_from(stored, part)
        into.copy_(stored)
        return
    if part.strides is None and into.is_contiguous():
        read_into(part.path, part.begin, into)
        return
    shape = part.shape
    strides = part.strides or torch.empty(shape, device="meta").stride()
    # Portions along the widest stride do not overlap in the file, so nothing is read twice.
    wide = max(range(len(shape)), key=lambda i: (shape[i] > 1, strides[i]))
    slice_extent = 1 + sum((n - 1) * s for i, (n, s) in enumerate(zip(shape, strides, strict=True)) if i != wide)
    at_once = max(1, _PORTION_BYTES // into.itemsize // strides[wide])
    for first in range(0, shape[wide], at_once):
        count = min(at_once, shape[wide] - first)
        portion = torch.empty((count - 1) * strides[wide] + slice_extent, dtype=into.dtype)
        read_into(part.path, part.begin + first * strides[wide] * into.itemsize, portion)
        view = portion.as_strided([count if i == wide else n for i, n in enumerate(shape)], strides)
        into.narrow(wide, first, count).copy_(view)


def warn_of_wide_weights(path: Path, parts: Iterable[TensorLocation], on_event: OnEvent) -> None:
    """A notice about weights in fp64."""
    if any(part.dtype == WIDE for part in parts):
        on_event(Notice(f"{path}: weights in fp64 are read as fp32"))


def refuse_unfit(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, TensorLocation] | Mapping[str, torch.Tensor],
    todo: str = "configuration and weights must be of the same model",
) -> None:
    """Raise one line that names the missing, unexpected and misshapen tensors, and stored ones of other dtypes."""
    faults = {
        "missing": [name for name in expected if name not in found],
        "unexpected": sorted(set(found) - set(expected)),
        "wrong shape": [
            f"{name} {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
        "neither float32, bfloat16 nor float16": [
            f"{name} {part.dtype}"
            for name, part in found.items()
            if isinstance(part, TensorLocation) and part.dtype not in READ_WEIGHTS
        ],
    }
    if listed := list_faults(faults):
        raise CheckpointError(f"the tensors do not fit the configuration ({listed})", path, todo)
