"""One row of a file before it is decoded: its bytes as JSON, its place, or why it cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_ROW_BYTES = 2 << 20
"""Longer rows are refused: 2 MiB is half a million tokens, far beyond LLaMA's context, and encoding it takes a few
hundred MB (up to 365 bytes a token for SentencePiece's offsets)."""

BLANK = b" \t\r\n"
_BYTES_OF_LARGER_ROWS = 1000


class RowError(Exception):
    """An unusable row: ``kind`` is its name in the report's counts, ``what`` the reason.

    ``message`` has the reason and, behind it, advice that only a verb with ``--map`` can give.
    """

    def __init__(self, kind: str, what: str, advice: str = "") -> None:
        super().__init__(kind, what, advice)
        self.kind, self.what, self.message = kind, what, what + advice


@dataclass(frozen=True, slots=True)
class RawRow:
    """The bytes of one row, and where it begins: 1-based line, 0-based byte of the file.

    A row of a table or text is given as the bytes of a JSON object. With an ``error``, ``data`` is what was read of the
    row. ``line`` is None in files without lines; ``row`` is its number within the file, from 1. In a list
    (``in_list``) the first line tells nothing: the whole list may be on it.
    """

    line: int | None
    offset: int
    data: bytes
    error: RowError | None = None
    row: int | None = None
    in_list: bool = False

    def place(self, path: object) -> str:
        """The row's place in the file ``path``, for messages."""
        return shown_place(path, None if self.in_list and self.line == 1 else self.line, self.row)


def shown_place(path: object, line: int | None, row: int | None) -> str:
    """``path:line: row N``; ``path:line`` if both numbers are equal, ``path: row N`` where a line tells nothing."""
    if line is None or (row is not None and row > line == 1):
        return f"{path}: row {row}"
    return f"{path}:{line}" if row in (None, line) else f"{path}:{line}: row {row}"


def too_large(data: bytes, offset: int) -> RowError:
    """The error for a row of which ``data``, its first bytes, exceed ``LARGEST_ROW_BYTES``."""
    if b"\0" in data and not data.strip(b"\0" + BLANK):
        return RowError("nul_bytes", f"NUL bytes from byte {offset} of the file on (a write that was cut off?)")
    return RowError("too_large", f"the row has more than {LARGEST_ROW_BYTES:,} bytes")


def beginning(data: bytes) -> bytes:
    """What is kept of a row that is too large."""
    return data[:_BYTES_OF_LARGER_ROWS].strip(BLANK)
