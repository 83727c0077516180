"""Rows in JSON: JSON Lines, a list, a list within an object, or objects written over several lines each.

Rows are separated before they are decoded: a line ends at ``\\n`` alone (U+2028 and U+0085 are text). An unreadable row
becomes a ``RowError`` and reading continues with the next.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import BinaryIO

from llamatune.data.json_elements import JsonElements
from llamatune.data.raw_row import BLANK, LARGEST_ROW_BYTES, RawRow, beginning, too_large
from llamatune.strict_json import parse_json

LISTS = ("data", "train", "rows", "examples", "instances", "records", "items", "samples")
"""Keys of an object under which a file may have its list of rows."""

_PORTION = 1 << 20
_MOST_NAMED = 5
_LONGEST_NAME = 80


def json_rows(file: BinaryIO, start: int, note: Callable[[str], None]) -> Iterator[RawRow]:
    """The rows of ``file``, from byte ``start`` on; ``note`` is called with what an object around them holds."""
    file.seek(start)
    portion = file.read(_PORTION)
    while portion and not portion.strip(BLANK):
        portion = file.read(_PORTION)
    first = portion.lstrip(BLANK)[:1]
    if first == b"[":
        file.seek(start)
        elements = JsonElements(file, start)
        yield from elements.of_list()
        yield from elements.rest()
        return
    if first == b"{" and not _is_json_lines(file, start):
        around = None if _are_several_objects(file, start) else _rows_in_object(file, start, note)
        rows = around or _objects(file, start)
        if rows is not None:
            yield from rows
            return
    file.seek(start)
    yield from _lines(file, start)


def _is_json_lines(file: BinaryIO, start: int) -> bool:
    """Whether the first line is a whole value and another follows."""
    file.seek(start)
    line = _next_line(file)
    return _is_object(line) and bool(_next_line(file))


def _next_line(file: BinaryIO) -> bytes:
    """The next line that is not blank, or its first ``LARGEST_ROW_BYTES``; empty at the end of the file."""
    while data := file.readline(LARGEST_ROW_BYTES + 1):
        if line := data.strip(BLANK):
            return line
    return b""


def _is_object(text: bytes) -> bool:
    try:
        return len(text) <= LARGEST_ROW_BYTES and isinstance(parse_json(text), dict)
    except ValueError:
        return False


def _are_several_objects(file: BinaryIO, start: int) -> bool:
    """Whether an object follows the first, which is no larger than a row: then no list in the first is the rows."""
    file.seek(start)
    found = JsonElements(io.BytesIO(file.read(LARGEST_ROW_BYTES + _PORTION)), 0).one_after_another()
    first, second = next(found), next(found, None)
    return first.error is None and _is_object(first.data) and second is not None and second.data.startswith(b"{")


def _rows_in_object(file: BinaryIO, start: int, note: Callable[[str], None]) -> Iterator[RawRow] | None:
    """The rows of the list of an object such as ``{"data": [...]}``; None if the file is none."""
    file.seek(start)
    elements, others = JsonElements(file, start), list[str]()
    while (key := elements.next_key()) is not None:
        if key in LISTS and elements.begins_rows():
            return _wrapped(elements, key, others, note)
        elements.skip_value()
        others.append(key[:_LONGEST_NAME])
        del others[_MOST_NAMED + 1 :]
    return None


def _wrapped(elements: JsonElements, name: str, others: list[str], note: Callable[[str], None]) -> Iterator[RawRow]:
    yield from elements.of_list()
    while elements.next_byte() == b"," and (key := elements.next_key()) is not None:
        elements.skip_value()
        others.append(key[:_LONGEST_NAME])
        del others[_MOST_NAMED + 1 :]
    if not elements.ended and elements.take() != b"}":
        yield elements.fault("not_json", "the object around the list is not closed: the file was cut short")
    yield from elements.rest()
    if others:
        shown = ", ".join(map(repr, others[:_MOST_NAMED])) + (" and more" if len(others) > _MOST_NAMED else "")
        note(f"the rows are those of {name!r}; left out beside it: {shown}")


def _objects(file: BinaryIO, start: int) -> Iterator[RawRow] | None:
    """The objects of a file that writes each over several lines; None if the first is no JSON."""
    file.seek(start)
    first = next(JsonElements(file, start).one_after_another())
    if first.error is not None or b"\n" not in first.data or not _is_object(first.data):
        return None
    file.seek(start)
    return JsonElements(file, start).one_after_another()


def _lines(file: BinaryIO, offset: int) -> Iterator[RawRow]:
    line = row = 0
    while data := file.readline(LARGEST_ROW_BYTES + 1):
        line += 1
        begin, offset = offset, offset + len(data)
        if len(data) > LARGEST_ROW_BYTES and not data.endswith(b"\n"):
            row += 1
            yield RawRow(line, begin, beginning(data), too_large(data, begin), row)
            while not data.endswith(b"\n") and (data := file.readline(_PORTION)):
                offset += len(data)
        elif content := data.strip(BLANK):
            row += 1
            yield RawRow(line, begin + len(data) - len(data.lstrip(BLANK)), content, None, row)
