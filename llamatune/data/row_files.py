"""Files of rows: what kind a file is, by its content and name, and the raw bytes of each of its rows.

Compressed and columnar files are known by their first bytes. Of the others those that begin as JSON are JSON whatever
their name; a ``.csv`` or ``.tsv`` is a table, a ``.txt`` text, and the rest JSON. Each is read in bounded memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from llamatune.data.columnar_rows import columnar_rows, is_columnar
from llamatune.data.compressed import SUFFIXES, Decompressed, is_compressed
from llamatune.data.foreign_files import foreign_kind
from llamatune.data.json_rows import json_rows
from llamatune.data.raw_row import RawRow
from llamatune.data.row_sources import is_directory, open_source, source_files, temporary_copy
from llamatune.data.saved_dataset import split_note
from llamatune.data.table_rows import table_rows
from llamatune.data.text_rows import text_rows
from llamatune.errors import DataError
from llamatune.safe_reading import open_regular, read_faults

Kind = Literal["json", "table", "text", "columnar"]

_BOM = b"\xef\xbb\xbf"
_HEAD = 4096
_PORTION = 1 << 20
_BY_SUFFIX: dict[str, Kind] = {".csv": "table", ".tsv": "table", ".tab": "table", ".txt": "text"}
_COLUMNAR_SUFFIXES = (".parquet", ".arrow", ".feather")
BEGINS_AS_JSON = re.compile(rb"""\s*(?:\{\s*["']|\[\s*(?:\{\s*["']|["']))""")
"""Of rows, or a list of prompts; ``[INST] Hi`` and ``{name} is`` begin otherwise."""


def _ignore(_: str) -> None:
    pass


def read_raw_rows(path: Path, note: Callable[[str], None] = _ignore) -> Iterator[RawRow]:
    """Every row of a file, a pipe, or a directory of ``save_to_disk``, numbered from 1; blank lines are no rows.

    ``note`` is called with a message about content of the file or directory that is not read.

    Raises:
        DataError: no such file, one that is damaged, or one of another kind, by name.
        EnvironmentFault: the file cannot be read, or a package for it is missing.
    """
    if is_directory(path):
        with contextlib.ExitStack() as stack, read_faults(path):
            files = [(stack.enter_context(open_regular(file, DataError)), file) for file in source_files(path)]
            if text := split_note(path):
                note(text)
            yield from columnar_rows(files)
        return
    with _opened(path) as opened, read_faults(path):
        rows = opened.rows(note)
        yield from rows if opened.compressed is None else opened.compressed.whole(rows, path)


def row_suffix(path: Path) -> str:
    """The ending of a file's name, without that of compression."""
    name = path.name.lower()
    for ending in SUFFIXES:
        name = name.removesuffix(ending)
    return Path(name).suffix


def file_kind(path: Path) -> Kind:
    """How a file is read: as JSON, a table, plain text, or by columns; raises as ``read_raw_rows`` does."""
    if is_directory(path):
        return "columnar"
    with _opened(path) as opened:
        return opened.kind


def read_text(path: Path, most: int) -> bytes:
    """The bytes of a file that is text, decompressed and without a byte order mark; ``DataError`` beyond ``most``."""
    with _opened(path) as opened, read_faults(path):
        opened.file.seek(opened.start)
        content = opened.file.read(most + 1)
        if opened.compressed is not None and opened.compressed.fault:
            raise DataError(opened.compressed.fault, path, "fetch or make it again")
    if len(content) > most:
        raise DataError(f"more than {most:,} bytes of text", path, "give fewer lines, or rows in JSON Lines")
    return content


@dataclass(frozen=True)
class _Opened:
    """A file of rows that is known to be one. It stands at its beginning, or behind the byte order mark."""

    file: BinaryIO
    path: Path
    suffix: str
    kind: Kind
    start: int
    compressed: Decompressed | None

    def rows(self, note: Callable[[str], None]) -> Iterator[RawRow]:
        self.file.seek(self.start)
        if self.kind == "json":
            return json_rows(self.file, self.start, note)
        if self.kind == "table":
            return table_rows(self.file, self.path, self.suffix)
        return text_rows(self.file) if self.kind == "text" else self._columnar_rows()

    def _columnar_rows(self) -> Iterator[RawRow]:
        if self.compressed is None:
            yield from columnar_rows([(self.file, self.path)])
            return
        # These files are read from their end on, which a compressed one does not allow.
        with temporary_copy(self._portions(), self.path) as file:
            if self.compressed.fault:
                raise DataError(self.compressed.fault, self.path, "fetch or make it again")
            yield from columnar_rows([(file, self.path)])

    def _portions(self) -> Iterator[bytes]:
        with read_faults(self.path):
            while portion := self.file.read(_PORTION):
                yield portion


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Opened]:
    with contextlib.ExitStack() as stack:
        with read_faults(path):
            file, compressed = stack.enter_context(open_source(path)), None
            head = file.read(_HEAD)
            if is_compressed(head):
                compressed = Decompressed(file, path)
                file = stack.enter_context(compressed.buffered())
                head = file.read(_HEAD)
        suffix = row_suffix(path)
        kind = _kind(head, suffix, path)
        yield _Opened(file, path, suffix, kind, len(_BOM) if head.startswith(_BOM) else 0, compressed)


def _kind(head: bytes, suffix: str, path: Path) -> Kind:
    """The kind of a file that begins with ``head``; ``DataError`` if it holds no rows that are read."""
    if foreign := foreign_kind(head, suffix):
        what, todo = foreign
        raise DataError(f"{what}, not a file of rows", path, todo)
    if is_compressed(head):
        raise DataError("compressed twice", path, "decompress it once")
    _refuse_other_encodings(head, path)
    if is_columnar(head):
        return "columnar"
    if suffix in _COLUMNAR_SUFFIXES:
        what = "empty" if not head else f"not what {suffix} files hold"
        raise DataError(f"the file is {what}", path, "fetch or make it again")
    if BEGINS_AS_JSON.match(head.removeprefix(_BOM)):
        return "json"
    return _BY_SUFFIX.get(suffix, "json")


def _refuse_other_encodings(head: bytes, path: Path) -> None:
    name = ""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        name = "UTF-16"
    elif len(head) >= 4 and head[:4].count(0) >= 2 and head[:4].strip(b"\0"):
        name = "UTF-16 or UTF-32 without a byte order mark"
    if name:
        raise DataError(f"{name} text (at byte 0), not UTF-8", f"{path}:1", "convert it: iconv -f UTF-16 -t UTF-8")
