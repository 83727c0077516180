"""Files of rows, in UTF-8: the raw bytes of each row of a JSON Lines file or a JSON list.

Rows are separated before they are decoded: a line ends at ``\\n`` alone (U+2028 and U+0085 are text), an element of a
list at the comma or bracket behind it. An unreadable row becomes a ``RowError`` and reading continues with the next;
at most ``LARGEST_ROW_BYTES`` of a row are kept. ijson would not do: it stops at the first syntax error and gives no
lines or bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llamatune.errors import DataError, EnvironmentFault
from llamatune.safe_reading import open_regular

LARGEST_ROW_BYTES = 2 << 20
"""Longer rows are refused: 2 MiB is half a million tokens, far beyond LLaMA's context, and encoding it takes a few
hundred MB (up to 365 bytes a token for SentencePiece's offsets)."""

_PORTION = 1 << 20
_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
# Each matches up to the next structural byte. Possessive quantifiers (++, *+) exclude backtracking; a string that is
# not closed in the buffer ends the match before its quote.
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_STRING = rb'"' + _STRING_REST.pattern + rb'"'
_INSIDE = re.compile(rb'(?:[^"{}\[\]]++|' + _STRING + rb")*+", re.DOTALL)
_OUTSIDE = re.compile(rb'(?:[^"{}\[\],]++|' + _STRING + rb")*+", re.DOTALL)
_NOT_BLANK = re.compile(rb"[^ \t\r\n]")
_DEPTH_CHANGE = {b'"': 0, b"{": 1, b"[": 1, b"}": -1, b"]": -1}


class RowError(Exception):
    """An unusable row: ``kind`` is its name in the report's counts, ``message`` the reason."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message


@dataclass(frozen=True, slots=True)
class RawRow:
    """The bytes of one row, or the error, and where it begins: 1-based line, 0-based byte of the file.

    ``row`` is its 1-based number in a JSON list; None in JSON Lines, where the line identifies the row.
    """

    line: int
    offset: int
    data: bytes
    error: RowError | None = None
    row: int | None = None

    def place(self, path: object) -> str:
        """The row's place in the file ``path``, for messages."""
        return shown_place(path, self.line, self.row)


def shown_place(path: object, line: int, row: int | None) -> str:
    """``path:line``; for a JSON list ``path: row N``, with the line unless it is the first."""
    if row is None:
        return f"{path}:{line}"
    return f"{path}: row {row}" if line == 1 else f"{path}:{line}: row {row}"


def read_raw_rows(path: Path) -> Iterator[RawRow]:
    """Every row of a JSON Lines file or JSON list, in bounded memory; blank lines and a BOM are skipped.

    Raises:
        DataError: no such file, not a regular file, or not UTF-8 but UTF-16 or UTF-32.
        EnvironmentFault: the file cannot be read.
    """
    with open_regular(path, DataError) as file:
        try:
            head = file.read(4096)
            _refuse_other_encodings(head, path)
            start = len(_BOM) if head.startswith(_BOM) else 0
            while len(head) < _PORTION and not head[start:].strip(_BLANK):
                more = file.read(4096)
                if not more:
                    return
                head += more
            file.seek(start)
            if head[start:].lstrip(_BLANK).startswith(b"["):
                yield from _ListReader(file, start).rows()
            else:
                yield from _lines(file, start)
        except OSError as fault:
            raise EnvironmentFault(f"cannot read: {fault.strerror}", path) from None


def _refuse_other_encodings(head: bytes, path: Path) -> None:
    name = ""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        name = "UTF-16"
    elif len(head) >= 4 and head[:4].count(0) >= 2 and head[:4].strip(b"\0"):
        name = "UTF-16 or UTF-32 without a byte order mark"
    if name:
        raise DataError(f"{name} text (at byte 0), not UTF-8", f"{path}:1", "convert it: iconv -f UTF-16 -t UTF-8")


def _too_large(data: bytes, offset: int) -> RowError:
    if not data.strip(b"\0" + _BLANK):
        return RowError("nul_bytes", f"NUL bytes from byte {offset} of the file on (a write that was cut off?)")
    return RowError("too_large", f"the row has more than {LARGEST_ROW_BYTES:,} bytes")


def _lines(file: BinaryIO, offset: int) -> Iterator[RawRow]:
    line = 0
    while data := file.readline(LARGEST_ROW_BYTES + 1):
        line += 1
        begin, offset = offset, offset + len(data)
        if len(data) > LARGEST_ROW_BYTES and not data.endswith(b"\n"):
            yield RawRow(line, begin, b"", _too_large(data, begin))
            while not data.endswith(b"\n") and (data := file.readline(_PORTION)):
                offset += len(data)
        elif row := data.strip(_BLANK):
            yield RawRow(line, begin + len(data) - len(data.lstrip(_BLANK)), row)


class _ListReader:
    """Splits one JSON list into its elements. Bytes of ``_buffer`` before ``_at`` are consumed."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self._file, self._buffer, self._at = file, b"", 0
        self._line, self._offset, self._row, self._ended = 1, offset, 0, False

    def rows(self) -> Iterator[RawRow]:
        self._take()
        separator = self._take() if self._next_byte() == b"]" else b","
        while separator == b",":
            byte = self._next_byte()
            if byte in (b",", b"]"):
                yield self._fault("not_json", f"a row is missing before {byte.decode()!r}")
            elif byte:
                yield self._element()
                if self._ended:
                    return
            separator = self._take()
        if not separator:
            yield self._fault("not_json", "the list is not closed: the file was cut short")
        elif self._next_byte() == b"\0":
            yield self._fault("nul_bytes", f"NUL bytes from byte {self._offset} of the file on")
        elif self._next_byte():
            yield self._fault("not_json", f"text after the end of the list, at byte {self._offset}")

    def _element(self) -> RawRow:
        """Consume the element at ``_at`` up to the comma or bracket that ends it."""
        self._row += 1
        line, offset, scan, depth, in_string = self._line, self._offset, self._at, 0, False
        error: RowError | None = None
        while True:
            pattern = _STRING_REST if in_string else _INSIDE if depth else _OUTSIDE
            match = pattern.match(self._buffer, scan)
            assert match is not None, "the patterns match the empty string too"
            scan = match.end()
            byte = self._buffer[scan : scan + 1]
            if depth == 0 and not in_string and byte in (b",", b"]"):
                break
            if byte in _DEPTH_CHANGE:
                in_string ^= byte == b'"'
                depth = max(0, depth + _DEPTH_CHANGE[byte])
                scan += 1
                continue
            if error is None and scan - self._at > LARGEST_ROW_BYTES:
                error = _too_large(self._buffer[self._at : scan], offset)
            if error is not None:  # search for its end, but keep nothing of it
                self._consume(scan - self._at)
            scan -= self._at
            if not self._read_on():
                self._ended = True
                return RawRow(line, offset, b"", error or self._unclosed(offset), self._row)
        data = self._buffer[self._at : scan]
        self._consume(len(data))
        if error is None and len(data) > LARGEST_ROW_BYTES:
            error = _too_large(data, offset)
        return RawRow(line, offset, b"" if error else data.strip(_BLANK), error, self._row)

    def _unclosed(self, offset: int) -> RowError:
        nul = self._buffer.find(b"\0", self._at)
        if nul >= 0:
            return RowError("nul_bytes", f"NUL bytes from byte {offset + nul - self._at} of the file on")
        return RowError("not_json", "the row does not end: a quote or bracket is not closed, or the file was cut short")

    def _take(self) -> bytes:
        """Consume the next byte that is not blank; empty at the end of the file."""
        byte = self._next_byte()
        self._consume(len(byte))
        return byte

    def _next_byte(self) -> bytes:
        """The next byte that is not blank, unconsumed; empty at the end of the file."""
        while True:
            match = _NOT_BLANK.search(self._buffer, self._at)
            self._consume((match.start() if match else len(self._buffer)) - self._at)
            if match:
                return match.group()
            if not self._read_on():
                return b""

    def _read_on(self) -> bool:
        more = self._file.read(_PORTION)
        self._buffer = self._buffer[self._at :] + more
        self._at = 0
        return bool(more)

    def _consume(self, count: int) -> None:
        self._line += self._buffer.count(b"\n", self._at, self._at + count)
        self._offset += count
        self._at += count

    def _fault(self, kind: str, message: str) -> RawRow:
        self._row += 1
        return RawRow(self._line, self._offset, b"", RowError(kind, message), self._row)
