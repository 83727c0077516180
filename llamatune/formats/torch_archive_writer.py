"""Writes PyTorch's zip format as a stream of plain tensors that ``torch.load`` reads, safely and memory-mapped.

No torch: the pickle is written opcode by opcode, so it can contain nothing else.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from llamatune.durable_writing import writing
from llamatune.formats.torch_pickle import STORAGE_CLASSES
from llamatune.shapes.dtypes import ITEM_BYTES

_ALIGNMENT = 64
_LARGEST_SHORT = 0xFFFFFFFF
"""From this value on, a size or an offset goes into zip's 64-bit fields, and this value into the 32-bit one."""
_DATE = (1980 - 1980) << 9 | 1 << 5 | 1
"""1 January 1980: the same tensors give the same bytes."""


@contextlib.contextmanager
def writing_archive(path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> Iterator[ArchiveWriter]:
    """A new archive, synced before the block ends. Its records are filed under its stem, such as ``consolidated.00``.

    ``tensors`` are ``(name, safetensors dtype, shape)`` in the order in which they will be written.
    """
    sizes = [math.prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in tensors]
    with writing(path, sum(sizes)) as file:
        writer = ArchiveWriter(file, path.stem, sizes)
        writer.record("data.pkl", memoryview(_pickle(tensors)))
        writer.record("byteorder", memoryview(b"little"))
        yield writer
        writer.finish()


class ArchiveWriter:
    """The records of an archive, and its directory at the end; ``sizes`` are the tensors' bytes."""

    def __init__(self, file: BinaryIO, name: str, sizes: list[int]) -> None:
        self._file, self._name, self._sizes = file, name, sizes
        self._written = self._position = 0
        self._directory: list[bytes] = []

    def write(self, data: memoryview) -> None:
        """The bytes of the next tensor, whole."""
        assert data.nbytes == self._sizes[self._written], "not the tensor that was declared"
        self.record(f"data/{self._written}", data)
        self._written += 1

    def finish(self) -> None:
        """Write the directory of the archive."""
        assert self._written == len(self._sizes), "declared tensors were not written"
        self.record("version", memoryview(b"3\n"))
        start, directory, count = self._position, b"".join(self._directory), len(self._directory)
        self._put(directory)
        end = self._position
        long = start >= _LARGEST_SHORT or count >= 0xFFFF
        if long:
            self._put(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), start))
            self._put(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        few = 0xFFFF if long else count
        offset = _LARGEST_SHORT if long else start
        self._put(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, few, few, len(directory), offset, 0))

    def record(self, name: str, data: memoryview) -> None:
        """One stored record: local header, bytes at a multiple of 64, and its entry for the directory."""
        path = f"{self._name}/{name}".encode()
        offset, size = self._position, data.nbytes
        long_size, long_offset = size >= _LARGEST_SHORT, offset >= _LARGEST_SHORT
        short_size = _LARGEST_SHORT if long_size else size
        extra = struct.pack("<HHQQ", 1, 16, size, size) if long_size else b""
        padding = -(offset + 30 + len(path) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        version = 45 if long_size or long_offset else 20
        facts = (0, 0, 0, _DATE, zlib.crc32(data), short_size, short_size, len(path))  # no flags, stored, midnight
        self._put(struct.pack("<4sHHHHHIIIHH", b"PK\3\4", version, *facts, len(extra)) + path + extra)
        self._put(data)
        longs = ([size, size] if long_size else []) + ([offset] if long_offset else [])
        extra = struct.pack(f"<HH{len(longs)}Q", 1, 8 * len(longs), *longs) if longs else b""
        short_offset = _LARGEST_SHORT if long_offset else offset
        entry = struct.pack("<4sHHHHHHIIIHH", b"PK\1\2", version, version, *facts, len(extra))
        self._directory.append(entry + struct.pack("<HHHII", 0, 0, 0, 0, short_offset) + path + extra)

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._position += memoryview(data).nbytes


def _pickle(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """A dictionary of ``torch._utils._rebuild_tensor_v2`` calls in pickle protocol 2."""
    parts = [b"\x80\x02}("]  # PROTO 2, EMPTY_DICT, MARK
    for key, (name, dtype, shape) in enumerate(tensors):
        stride = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        parts += [
            _text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",  # GLOBAL, MARK of the arguments, MARK of the storage's identity
            _text("storage"),
            b"ctorch\n" + STORAGE_CLASSES[dtype].encode() + b"\n",
            _text(str(key)) + _text("cpu") + _number(math.prod(shape)),
            b"tQ" + _number(0),  # TUPLE, BINPERSID, offset
            b"(" + b"".join(map(_number, shape)) + b"t",
            b"(" + b"".join(map(_number, stride)) + b"t",
            b"\x89ccollections\nOrderedDict\n)RtR",  # NEWFALSE, no hooks, TUPLE, REDUCE
        ]
    parts.append(b"u.")  # SETITEMS, STOP
    return b"".join(parts)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded  # BINUNICODE


def _number(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)  # BININT
    return b"\x8a\x08" + struct.pack("<q", value)  # LONG1
