"""JSON split into elements before it is decoded: of a list, or one after another, each with its line and number.

An element ends at the comma or bracket behind it. An unreadable one becomes a ``RowError`` and reading continues with
the next; at most ``LARGEST_ROW_BYTES`` of an element are kept. ijson would not do: it stops at the first syntax error
and gives no lines or bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from llamatune.data.raw_row import BLANK, LARGEST_ROW_BYTES, RawRow, RowError, beginning, too_large

_PORTION = 1 << 20
_LONGEST_KEY = 1000
# Each matches up to the next structural byte. Possessive quantifiers (++, *+) exclude backtracking; a string that is
# not closed in the buffer ends the match before its quote.
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_STRING = rb'"' + _STRING_REST.pattern + rb'"'
_INSIDE = re.compile(rb'(?:[^"{}\[\]]++|' + _STRING + rb")*+", re.DOTALL)
_OUTSIDE = re.compile(rb'(?:[^"{}\[\],]++|' + _STRING + rb")*+", re.DOTALL)
_KEY = re.compile(_STRING + rb"[ \t\r\n]*+:", re.DOTALL)
_NOT_BLANK = re.compile(rb"[^ \t\r\n]")
_DEPTH_CHANGE = {b'"': 0, b"{": 1, b"[": 1, b"}": -1, b"]": -1}


class JsonElements:
    """Reads a JSON file from byte ``offset`` on. Bytes of ``_buffer`` before ``_at`` are consumed."""

    def __init__(self, file: BinaryIO, offset: int) -> None:
        self._file, self._buffer, self._at = file, b"", 0
        self._line, self._offset, self._row, self.ended = 1, offset, 0, False

    def of_list(self) -> Iterator[RawRow]:
        """The elements of the list that comes next, consumed with its closing bracket."""
        self.take()
        separator = self.take() if self.next_byte() == b"]" else b","
        while separator == b",":
            byte = self.next_byte()
            if byte in (b",", b"]"):
                yield self.fault("not_json", f"a row is missing before {byte.decode()!r}")
            elif byte:
                yield self._element(b",]")
                if self.ended:
                    return
            separator = self.take()
        if not separator:
            self.ended = True
            yield self.fault("not_json", "the list is not closed: the file was cut short")

    def one_after_another(self) -> Iterator[RawRow]:
        """Objects with nothing but white space between them."""
        while byte := self.next_byte():
            if byte == b"{":
                yield self._element(b"")
                if self.ended:
                    return
            else:
                yield self.fault("not_json", f"text between rows, at byte {self._offset}")
                self._skip_line()

    def rest(self) -> Iterator[RawRow]:
        """The fault that anything more in the file is; nothing at its end, or after an element that did not end."""
        if not self.ended and self.next_byte() == b"\0":
            yield self.fault("nul_bytes", f"NUL bytes from byte {self._offset} of the file on")
        elif not self.ended and self.next_byte():
            yield self.fault("not_json", f"text after the end of the list, at byte {self._offset}")

    def next_key(self) -> str | None:
        """Consume the brace or comma that comes next, and the key behind it; None if no key follows."""
        if self.take() not in (b"{", b",") or self.next_byte() != b'"':
            return None
        while not (match := _KEY.match(self._buffer, self._at)):
            if len(self._buffer) - self._at > _LONGEST_KEY or not self._read_on():
                return None
        self._consume(match.end() - self._at)
        try:
            return str(json.loads(match.group()[:-1]))
        except ValueError:
            return None

    def skip_value(self) -> None:
        """Consume the value that comes next, keeping none of it."""
        self._element(b",}", keep=False)

    def begins_rows(self) -> bool:
        """Whether a list of objects, or an empty one, comes next."""
        return self.next_byte() == b"[" and self._second_byte() in (b"{", b"]")

    def _second_byte(self) -> bytes:
        """The byte after the next one that is not blank, unconsumed."""
        while not (match := _NOT_BLANK.search(self._buffer, self._at + 1)):
            if not self._read_on():
                return b""
        return match.group()

    def _element(self, ends: bytes, keep: bool = True) -> RawRow:
        """Consume the element at ``_at``, up to the byte of ``ends`` behind it, or to its own closing bracket."""
        self._row += keep
        line, offset, scan, depth, in_string = self._line, self._offset, self._at, 0, False
        error: RowError | None = None
        kept = b""
        while True:
            pattern = _STRING_REST if in_string else _INSIDE if depth else _OUTSIDE
            match = pattern.match(self._buffer, scan)
            assert match is not None, "the patterns match the empty string too"
            scan = match.end()
            byte = self._buffer[scan : scan + 1]
            if depth == 0 and not in_string and byte and byte in ends:
                break
            if byte in _DEPTH_CHANGE:
                in_string ^= byte == b'"'
                depth = max(0, depth + _DEPTH_CHANGE[byte])
                scan += 1
                if not ends and depth == 0 and not in_string:
                    break
                continue
            if error is None and scan - self._at > LARGEST_ROW_BYTES:
                error = too_large(self._buffer[self._at : scan], offset)
                kept = beginning(self._buffer[self._at : scan])
            if error is not None or not keep:  # search for its end, but keep nothing of it
                self._consume(scan - self._at)
            scan -= self._at
            if not self._read_on():
                self.ended = True
                rest = kept or beginning(self._buffer[self._at :])
                return RawRow(line, offset, rest, error or self._unclosed(offset), self._row, True)
        data = self._buffer[self._at : scan]
        self._consume(len(data))
        if error is None and len(data) > LARGEST_ROW_BYTES:
            error, kept = too_large(data, offset), beginning(data)
        return RawRow(line, offset, kept if error else data.strip(BLANK), error, self._row, True)

    def _unclosed(self, offset: int) -> RowError:
        nul = self._buffer.find(b"\0", self._at)
        if nul >= 0:
            return RowError("nul_bytes", f"NUL bytes from byte {offset + nul - self._at} of the file on")
        return RowError("not_json", "the row does not end: a quote or bracket is not closed, or the file was cut short")

    def take(self) -> bytes:
        """Consume the next byte that is not blank; empty at the end of the file."""
        byte = self.next_byte()
        self._consume(len(byte))
        return byte

    def next_byte(self) -> bytes:
        """The next byte that is not blank, unconsumed; empty at the end of the file."""
        while True:
            match = _NOT_BLANK.search(self._buffer, self._at)
            self._consume((match.start() if match else len(self._buffer)) - self._at)
            if match:
                return match.group()
            if not self._read_on():
                return b""

    def _skip_line(self) -> None:
        while (end := self._buffer.find(b"\n", self._at)) < 0:
            self._consume(len(self._buffer) - self._at)
            if not self._read_on():
                return
        self._consume(end - self._at)

    def _read_on(self) -> bool:
        more = self._file.read(_PORTION)
        self._buffer = self._buffer[self._at :] + more
        self._at = 0
        return bool(more)

    def _consume(self, count: int) -> None:
        self._line += self._buffer.count(b"\n", self._at, self._at + count)
        self._offset += count
        self._at += count

    def fault(self, kind: str, message: str) -> RawRow:
        """A row that is nothing but an error at the place that was reached."""
        self._row += 1
        return RawRow(self._line, self._offset, b"", RowError(kind, message), self._row, True)
