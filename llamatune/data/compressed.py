"""Compressed files, read as a stream: gzip by the standard library, zstd by Python 3.14 or the extra ``data``."""

from __future__ import annotations

import gzip
import importlib
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from llamatune.data.raw_row import RawRow
from llamatune.errors import DataError, EnvironmentFault

_GZIP, _ZSTD = b"\x1f\x8b", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # pzstd begins with the second
SUFFIXES = (".gz", ".gzip", ".zst", ".zstd")
_PORTION = 1 << 18


def is_compressed(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is compressed in a way that is read."""
    return head.startswith(_GZIP) or _ZSTD.match(head) is not None


class Decompressed(io.RawIOBase):
    """What a compressed file holds. It ends where the file is damaged or cut off, which ``fault`` then tells."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        file.seek(0)
        self._file, self._zstd = file, None if file.read(len(_GZIP)) == _GZIP else _zstd(path)
        self._errors = (EOFError, zlib.error, gzip.BadGzipFile, *([self._zstd.ZstdError] if self._zstd else []))
        self._begin()

    def _begin(self) -> None:
        self._file.seek(0)
        self._stream: Any = self._zstd.ZstdFile(self._file) if self._zstd else gzip.GzipFile(fileobj=self._file)
        self._last, self.fault = b"", ""

    def buffered(self) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(self, _PORTION))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        assert whence == io.SEEK_SET
        self._begin()  # the libraries' own streams cannot go back behind a fault
        while offset > self.tell() and self.readinto(bytearray(min(_PORTION, offset - self.tell()))):
            pass
        return self.tell()

    def tell(self) -> int:
        return int(self._stream.tell())

    def readinto(self, buffer: Any, /) -> int:
        if self.fault:
            return 0
        try:
            portion = self._stream.read1(len(buffer))
        except self._errors as fault:
            self.fault = _told(fault)
            return 0
        buffer[: len(portion)] = portion
        self._last = portion[-1:] or self._last
        return len(portion)

    def whole(self, rows: Iterator[RawRow], path: Path) -> Iterator[RawRow]:
        """``rows``, which are read from this; but no row that the end of a damaged file cut off.

        Raises:
            DataError: at the end, if the file is damaged.
        """
        held: RawRow | None = None
        for raw in rows:
            if held is not None:
                yield held
            held = raw
        if self.fault:
            last = 0  # in a damaged file these may be the ruins of rows: a checksum does not tell where the damage is
            if held is not None and held.row is not None:
                is_whole = held.error is None and (held.in_list or self._last == b"\n")
                last = held.row if is_whole else held.row - 1
            what = f"{self.fault}; the last whole row before that is row {last}"
            raise DataError(what, path, "fetch or make it again")
        if held is not None:
            yield held


def _told(fault: Exception) -> str:
    if isinstance(fault, EOFError):
        return "the compressed file was cut off"
    if "too much memory" in str(fault):
        return "the compressed file needs a window of more than 128 MiB (zstd --long)"
    return f"the compressed file is damaged ({str(fault)[:200]})"


def _zstd(path: Path) -> Any:
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(module)
        except ImportError:
            continue
    what = "zstd is read by Python 3.14 or later, or through the package backports.zstd, which is not installed"
    raise EnvironmentFault(what, path, "pip install backports.zstd, or zstd -d FILE")
