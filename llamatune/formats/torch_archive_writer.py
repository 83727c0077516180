"""PyTorch's zip format (``torch.save``), written: plain tensors are streamed or copied from other files. No torch.

The pickle is written opcode by opcode, so it can contain nothing else.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamatune.formats.digested_file import DigestedFile, writing_digested
from llamatune.formats.file_range import FileRange
from llamatune.formats.manifest import Staging
from llamatune.formats.torch_pickle import STORAGE_CLASSES
from llamatune.shapes.dtypes import ITEM_BYTES

_ALIGNMENT = 64
_LARGEST_SHORT = 0xFFFFFFFF
"""From this value on, a size or an offset goes into zip's 64-bit fields, and this value into the 32-bit one."""
_DATE = (1980 - 1980) << 9 | 1 << 5 | 1
"""1 January 1980: the same tensors give the same bytes."""


@contextlib.contextmanager
def writing_archive(
    staging: Staging, file_name: str, tensors: Sequence[tuple[str, str, tuple[int, ...]]]
) -> Iterator[ArchiveWriter]:
    """A new archive in a product. Its records are filed under its stem, ``consolidated.00``.

    ``tensors`` are ``(name, safetensors dtype, shape)`` in the order in which they will be written.
    """
    sizes = [math.prod(shape) * ITEM_BYTES[dtype] for _, dtype, shape in tensors]
    with writing_digested(staging, file_name, sum(sizes)) as file:
        writer = ArchiveWriter(file, Path(file_name).stem, sizes)
        for name, content in (("data.pkl", _pickle(tensors)), ("byteorder", b"little")):
            writer.record(name, content)
        yield writer
        writer.finish()


class ArchiveWriter:
    """The records of an archive, and its directory at the end; ``sizes`` are the tensors' bytes.

    ``last_tensor`` is where the last one lies that was written.
    """

    last_tensor: FileRange

    def __init__(self, file: DigestedFile, name: str, sizes: list[int]) -> None:
        self._file, self._name, self._sizes = file, name, sizes
        self._written = 0
        self._open: _Record | None = None
        self._directory: list[bytes] = []

    def write(self, data: memoryview | FileRange) -> None:
        """The bytes of the next tensor, or the next of its bytes."""
        if self._open is None:
            self._open = self._begin(f"data/{self._written}", self._sizes[self._written])
        begin = self._file.position
        self._file.append(data)
        if isinstance(data, FileRange) and data.crc is not None and data.end - data.begin == self._open.size:
            self._open.crc = data.crc  # torch's loader checks none; what is copied keeps what its archive states
        else:
            for block in self._file.copied(begin) if isinstance(data, FileRange) else [data]:
                self._open.crc = zlib.crc32(block, self._open.crc)
        if self._file.position >= self._open.begin + self._open.size:
            self._end(self._open)
            self.last_tensor = FileRange(self._file.path, self._open.begin, self._file.position, self._open.crc)
            self._open, self._written = None, self._written + 1

    def record(self, name: str, content: bytes) -> None:
        """A whole record beside the tensors."""
        record = self._begin(name, len(content))
        self._file.append(content)
        record.crc = zlib.crc32(content)
        self._end(record)

    def finish(self) -> None:
        assert self._written == len(self._sizes), "declared tensors were not written"
        self.record("version", b"3\n")
        start, directory, count = self._file.position, b"".join(self._directory), len(self._directory)
        self._file.append(directory)
        end = self._file.position
        long = start >= _LARGEST_SHORT or count >= 0xFFFF
        if long:
            totals = (count, count, len(directory), start)
            self._file.append(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, *totals))
            self._file.append(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        few = 0xFFFF if long else count
        offset = _LARGEST_SHORT if long else start
        self._file.append(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, few, few, len(directory), offset, 0))

    def _begin(self, name: str, size: int) -> _Record:
        record = _Record(f"{self._name}/{name}".encode(), self._file.position, size)
        self._file.append(record.header())
        return record

    def _end(self, record: _Record) -> None:
        assert self._file.position == record.begin + record.size, "not the tensor that was declared"
        self._file.rewrite(record.offset, record.header())  # which now has its CRC
        self._file.follow()
        self._directory.append(record.entry())


@dataclass
class _Record:
    """A stored record at ``offset``: a local header, bytes from a multiple of 64 on, and an entry of the directory."""

    path: bytes
    offset: int
    size: int
    crc: int = 0

    @property
    def begin(self) -> int:
        """Where its bytes begin."""
        return self.offset + len(self.header())

    def header(self) -> bytes:
        extra = struct.pack("<HHQQ", 1, 16, self.size, self.size) if self._long_size else b""
        padding = -(self.offset + 30 + len(self.path) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        facts = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", self._version, *self._facts, len(extra))
        return facts + self.path + extra

    def entry(self) -> bytes:
        longs = ([self.size, self.size] if self._long_size else []) + ([self.offset] if self._long_offset else [])
        extra = struct.pack(f"<HH{len(longs)}Q", 1, 8 * len(longs), *longs) if longs else b""
        offset = _LARGEST_SHORT if self._long_offset else self.offset
        entry = struct.pack("<4sHHHHHHIIIHH", b"PK\1\2", self._version, self._version, *self._facts, len(extra))
        return entry + struct.pack("<HHHII", 0, 0, 0, 0, offset) + self.path + extra

    @property
    def _facts(self) -> tuple[int, ...]:
        """No flags, stored, midnight, date, CRC, sizes, length of the name."""
        size = _LARGEST_SHORT if self._long_size else self.size
        return (0, 0, 0, _DATE, self.crc, size, size, len(self.path))

    @property
    def _version(self) -> int:
        return 45 if self._long_size or self._long_offset else 20

    @property
    def _long_size(self) -> bool:
        return self.size >= _LARGEST_SHORT

    @property
    def _long_offset(self) -> bool:
        return self.offset >= _LARGEST_SHORT


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
