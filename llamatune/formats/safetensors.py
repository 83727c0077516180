"""The safetensors format: a header check that allocates nothing, and a writer that streams. No torch.

Tensors are read by the ``safetensors`` library, which offers neither of the two.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llamatune.errors import CheckpointError, LlamatuneError
from llamatune.formats.digested_file import writing_digested
from llamatune.formats.file_range import FileRange
from llamatune.formats.manifest import Staging
from llamatune.safe_reading import open_regular, stand_in
from llamatune.shapes.dtypes import ITEM_BYTES
from llamatune.strict_json import parse_json

_LARGEST_HEADER = 100_000_000
_LARGEST_DIMENSION = 1 << 40
_PORTION_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorLocation:
    """A tensor, or one shard's part of it, as it is stored: its bytes are ``begin:end`` of the file at ``path``.

    ``dtype`` is the safetensors name, such as ``BF16``. A view in a PyTorch archive has ``strides``, in elements; None:
    the elements fill the bytes in order. ``crc`` is the CRC-32 that such an archive states of just these bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    strides: tuple[int, ...] | None = None
    crc: int | None = None

    def rows(self, first: int, count: int) -> TensorLocation:
        """Of some of its rows, which must be runs of bytes."""
        width = math.prod(self.shape[1:]) if self.strides is None else self.strides[0]
        step = width * ITEM_BYTES[self.dtype]
        begin = self.begin + first * step
        return replace(self, shape=(count, *self.shape[1:]), begin=begin, end=begin + count * step, crc=None)


def read_header(
    path: Path, error: type[LlamatuneError] = CheckpointError
) -> tuple[dict[str, TensorLocation], dict[str, str]]:
    """The tensors and the metadata that a safetensors file declares, proven consistent with its size.

    Raises:
        error: truncated or trailing bytes, overlapping or missing ranges, unknown dtypes, shapes that do not fit.
    """
    with open_regular(path, error) as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise error(f"{file_bytes} bytes is no safetensors file", path, "fetch it again")
        header_bytes = struct.unpack("<Q", prefix)[0]
        if header_bytes > _LARGEST_HEADER or 8 + header_bytes > file_bytes:
            archive = "a zip archive (a PyTorch checkpoint?), not a safetensors file" if prefix[:2] == b"PK" else None
            what = stand_in(prefix) or archive or "not a safetensors file, or cut short"
            raise error(what, path, "fetch it again")
        raw = file.read(header_bytes)
    try:
        header = parse_json(raw)
        if not isinstance(header, dict):
            raise ValueError("not an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("__metadata__ is not a map of strings")
        data_start = 8 + header_bytes
        entries = {name: _location(path, name, facts, data_start) for name, facts in header.items()}
    except ValueError as fault:
        raise error(f"broken safetensors header: {fault}", path, "fetch it again") from None
    expected = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != expected:
            raise error(f"tensor {name} overlaps another one or leaves a gap", path, "fetch it again")
        expected = entry.end
    if expected != file_bytes:
        raise error(f"{file_bytes:,} bytes where its header declares {expected:,}", path, "fetch it again")
    return entries, metadata


def _location(path: Path, name: str, facts: object, data_start: int) -> TensorLocation:
    if not isinstance(facts, dict) or not {"dtype", "shape", "data_offsets"} <= facts.keys():
        raise ValueError(f"tensor {name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < _LARGEST_DIMENSION for n in shape):
        raise ValueError(f"tensor {name} has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise ValueError(f"tensor {name} has the impossible offsets {offsets!r}")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"tensor {name} of shape {shape} and dtype {dtype} does not fill its {end - begin} bytes")
    return TensorLocation(path, dtype, tuple(shape), data_start + begin, data_start + end)


def same_bytes(one: TensorLocation, other: TensorLocation) -> bool:
    """Whether two tensors hold the same bytes; reads no further than the first difference."""
    if one == other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape or one.strides != other.strides:
        return False
    size = one.end - one.begin
    with open_regular(one.path) as left, open_regular(other.path) as right:
        left.seek(one.begin)
        right.seek(other.begin)
        portions = (min(_PORTION_BYTES, size - done) for done in range(0, size, _PORTION_BYTES))
        return all(left.read(count) == right.read(count) for count in portions)


METADATA = {"format": "pt"}
"""Of a file of torch's tensors: transformers asks for it."""

DeclaredBytes = tuple[str, str, tuple[int, ...]]
"""A tensor to be written: name, dtype and shape."""


def header_of(tensors: Iterable[DeclaredBytes], metadata: Mapping[str, str] | None = None) -> tuple[bytes, int]:
    """What stands before the tensors' bytes in a file, and how many bytes they are."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    size = 0
    for name, dtype, shape in tensors:
        end = size + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [size, end]}
        size = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, size


def write_safetensors(
    staging: Staging,
    file_name: str,
    tensors: Iterable[DeclaredBytes],
    data: Iterable[bytes | memoryview | FileRange],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Stream a new file into a product. It is digested on the way, so the manifest needs no second read of it.

    Args:
        tensors: in the order in which the bytes come.
        data: the bytes of all tensors, in any portions.
        metadata: the strings of ``__metadata__``.
    """
    header, size = header_of(tensors, metadata)
    with writing_digested(staging, file_name, size) as file:
        for portion in itertools.chain([header], data):
            file.append(portion)
            file.follow()
        assert file.position == len(header) + size, "not the bytes that the header declares"
