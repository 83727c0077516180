"""Rows of plain text: a document from one blank line to the next, as the bytes of a JSON object with ``text``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import BinaryIO

from llamatune.data.raw_row import BLANK, LARGEST_ROW_BYTES, RawRow, RowError, beginning
from llamatune.strict_json import parse_json


def text_rows(file: BinaryIO) -> Iterator[RawRow]:
    """The documents of ``file`` from where it stands. Line ends become ``\\n``; at most one row's bytes are kept."""
    offset, line, row = file.tell(), 0, 0
    begin, first_line, size, kept = offset, 1, 0, list[bytes]()
    while True:
        data = file.readline(LARGEST_ROW_BYTES + 1)
        if data.strip(BLANK):
            if not kept:
                begin, first_line = offset, line + 1
            size += len(data)
            if size <= LARGEST_ROW_BYTES or not kept:
                kept.append(data)
        elif kept:
            row += 1
            yield _document(b"".join(kept), size, first_line, begin, row)
            size, kept = 0, []
        if not data:
            return
        offset += len(data)
        line += data.endswith(b"\n")


def _document(data: bytes, size: int, line: int, begin: int, row: int) -> RawRow:
    if size > LARGEST_ROW_BYTES:
        what = f"the document has more than {LARGEST_ROW_BYTES:,} bytes without a blank line"
        return RawRow(line, begin, beginning(data), RowError("too_large", what), row)
    data = data.replace(b"\r\n", b"\n").strip(b"\r\n")
    try:
        text = data.decode()
    except UnicodeDecodeError as fault:
        what = f"byte 0x{data[fault.start]:02x} of the document is not UTF-8 (Latin-1 text? iconv converts it)"
        return RawRow(line, begin, data, RowError("not_utf8", what), row)
    if _is_row(data.split(b"\n", 1)[0]):
        what = "a JSON row in a file that begins as plain text (is it JSON Lines? then every line is a row)"
        return RawRow(line, begin, data, RowError("json_in_text", what), row)
    return RawRow(line, begin, json.dumps({"text": text}, ensure_ascii=False).encode(), None, row)


def _is_row(line: bytes) -> bool:
    if not line.startswith(b"{"):
        return False
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False
