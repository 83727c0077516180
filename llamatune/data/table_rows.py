"""Rows of CSV and TSV files: strictly the fields that the header names, each row as the bytes of a JSON object."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from llamatune.data.raw_row import LARGEST_ROW_BYTES, RawRow, RowError, beginning, too_large
from llamatune.errors import DataError

_BY_NAME = {".tsv": "\t", ".tab": "\t"}
_OTHERS = (";", "\t", "|")
_EXCELS_SEPARATOR = re.compile('"?sep=(.)"?')


def table_rows(file: BinaryIO, path: Path, suffix: str) -> Iterator[RawRow]:
    """The rows below the header; the separator is a comma or tab by ``suffix``, or what only the header can mean.

    Raises:
        DataError: no header, or one with a name that is empty or comes twice.
    """
    csv.field_size_limit(LARGEST_ROW_BYTES)
    lines = _Lines(file)
    header_line = next(lines, "")
    while header_line and not header_line.strip():
        header_line = next(lines, "")
    if not header_line:
        return
    separator = _BY_NAME.get(suffix, ",")
    if named := _EXCELS_SEPARATOR.fullmatch(header_line.strip()):
        separator, header_line = named[1], next(lines, "")
    where = f"{path}:{lines.number}"
    if lines.is_cut:
        raise DataError(f"a header of more than {LARGEST_ROW_BYTES:,} bytes", where, "is it one line?")
    if "\r" in header_line.rstrip("\r\n"):
        raise DataError("its lines end in carriage returns alone", where, "convert it: tr '\\r' '\\n'")
    lines.separator = separator = _separator(header_line, separator)
    names = _header(header_line, separator, where)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    row = 0
    while True:
        lines.begin_row()
        line, begin = lines.number + 1, lines.offset
        cells, error = list[str](), None
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as fault:
            error = RowError("not_csv", _reason(fault))
        if not any(cells) and error is None:
            continue  # a blank line, or an empty one of a sheet
        row += 1
        if lines.is_cut:
            error = RowError("too_large", f"the row has more than {LARGEST_ROW_BYTES:,} bytes")
        yield _row(names, cells, error or _misfit(names, cells), line, begin, row)


class _Lines:
    """The lines of ``file`` for ``csv.reader``: bytes that are no UTF-8 as lone surrogates, too long lines cut.

    A line that is cut leaves a quote open if the whole line does, so that the rows behind it are read.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.number, self.offset, self.separator = file, 0, file.tell(), ","
        self.begin_row()

    def begin_row(self) -> None:
        self.is_cut = self._in_quotes = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        data = self._file.readline(LARGEST_ROW_BYTES + 1)
        if not data:
            raise StopIteration
        self.number += 1
        self.offset += len(data)
        self._in_quotes ^= bool(data.count(b'"') % 2)
        text = data.decode(errors="surrogateescape")
        return text if len(data) <= LARGEST_ROW_BYTES or data.endswith(b"\n") else text + self._end_of_cut()

    def _end_of_cut(self) -> str:
        """What stands for the rest of a line that is too long."""
        self.is_cut, was_in_quotes, rest = True, self._in_quotes, b"."
        while rest and not rest.endswith(b"\n"):
            rest = self._file.readline(LARGEST_ROW_BYTES + 1)
            self.offset += len(rest)
            self._in_quotes ^= bool(rest.count(b'"') % 2)
        if was_in_quotes == self._in_quotes:
            return "\n"
        return '"\n' if was_in_quotes else f'{self.separator}"\n'


def _separator(header: str, expected: str) -> str:
    """``expected``, unless it makes one column of a header in which another separator makes several."""
    if len(next(csv.reader([header], delimiter=expected), [])) > 1:
        return expected
    return next((sign for sign in _OTHERS if len(next(csv.reader([header], delimiter=sign))) > 1), expected)


def _header(line: str, separator: str, where: str) -> list[str]:
    try:
        names = [name.strip() for name in next(csv.reader([line], delimiter=separator, strict=True), [])]
    except csv.Error as fault:
        raise DataError(f"the header cannot be read: {_reason(fault)}", where) from None
    if any("\ud800" <= sign <= "\udfff" for sign in line):
        raise DataError("the header is not UTF-8", where, "convert it: iconv -f LATIN1 -t UTF-8")
    if not names:
        raise DataError("no header", where, "the first line names the columns")
    if "" in names:
        todo = "name it, or leave it out (pandas: to_csv(..., index=False))"
        raise DataError(f"column {names.index('') + 1} has no name in the header", where, todo)
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise DataError(f"the header has the column {name[:80]!r} twice", where, "rename or leave out one of them")
    return names


def _reason(fault: csv.Error) -> str:
    text = str(fault)
    if "field larger" in text:
        return f"a field of more than {LARGEST_ROW_BYTES:,} characters: is a quote not closed?"
    if "unexpected end" in text:
        return "a quote is not closed: the file was cut short, or a quote within a field is not doubled"
    if "new-line" in text:
        return "a carriage return within a field that has no quotes"
    return f"not valid CSV: {text} (a quote within a field is written twice)"


def _misfit(names: Sequence[str], cells: Sequence[str]) -> RowError | None:
    if len(cells) != len(names):
        fields = f"{len(cells)} field" + "s" * (len(cells) != 1)
        return RowError("columns", f"{fields} where the header names {len(names)}")
    return None


def _row(names: Sequence[str], cells: Sequence[str], error: RowError | None, line: int, begin: int, row: int) -> RawRow:
    if error is not None:
        data = beginning(json.dumps(cells, ensure_ascii=False).encode(errors="replace")) if cells else b""
        return RawRow(line, begin, data, error, row)
    text = json.dumps(dict(zip(names, cells, strict=True)), ensure_ascii=False)
    try:
        data = text.encode()
    except UnicodeEncodeError as fault:
        byte = ord(text[fault.start]) & 0xFF
        error = RowError("not_utf8", f"byte 0x{byte:02x} of the row is not UTF-8 (Latin-1 text? iconv converts it)")
        return RawRow(line, begin, text.encode(errors="replace"), error, row)
    if len(data) > LARGEST_ROW_BYTES:
        return RawRow(line, begin, beginning(data), too_large(data, begin), row)
    return RawRow(line, begin, data, None, row)
