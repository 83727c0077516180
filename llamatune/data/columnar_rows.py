"""Rows of Parquet and Arrow files, read by pyarrow in batches, each as the bytes of a JSON object."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llamatune.data.raw_row import LARGEST_ROW_BYTES, RawRow, beginning, too_large
from llamatune.errors import DataError, EnvironmentFault

_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_BATCH_ROWS = 256
_BUFFER = 1 << 20


def is_columnar(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is Parquet, or Arrow in either of its formats."""
    return head.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM))


def columnar_rows(files: Sequence[tuple[BinaryIO, Path]]) -> Iterator[RawRow]:
    """The rows of ``files`` one after the other, counted through.

    Raises:
        DataError: a file that is damaged, or names a column twice.
        EnvironmentFault: pyarrow is missing.
    """
    row = 0
    for file, path in files:
        pyarrow = _pyarrow(path)
        try:
            for batch in _batches(pyarrow, _WithinFile(file), path):
                for values in _dated(pyarrow, batch).to_pylist():
                    row += 1
                    yield _row(values, row)
        except (pyarrow.ArrowException, ValueError, OverflowError) as fault:
            raise _damaged(fault, path, row) from None
        except OSError as fault:
            if fault.errno is not None:
                raise
            raise _damaged(fault, path, row) from None


def _damaged(fault: Exception, path: Path, row: int) -> DataError:
    is_value = type(fault) in (ValueError, OverflowError)  # of pyarrow's conversion, such as nanoseconds in a struct
    what = "a value cannot be read" if is_value else "the file is damaged or was cut off"
    reason = str(fault).split("\n", 1)[0][:200]
    todo = "leave its column out" if is_value else "fetch or make it again"
    where = f", behind row {row}" if row else ""
    return DataError(f"{what}{where} ({reason})", path, todo)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        what = "Parquet and Arrow files are read through the package pyarrow, which is not installed"
        raise EnvironmentFault(what, path, "pip install pyarrow") from None
    return pyarrow


class _WithinFile:
    """A file whose reads end with it: pyarrow asks for as many bytes as a length in the file says, damaged or not."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, file.seek(0, os.SEEK_END)
        file.seek(0)

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._file.tell(), 0)
        return self._file.read(left if size < 0 else min(size, left))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _batches(pyarrow: Any, file: _WithinFile, path: Path) -> Iterator[Any]:
    """Batches of at most ``_BATCH_ROWS`` rows."""
    magic = file.read(len(_ARROW_FILE))
    file.seek(0)
    with contextlib.ExitStack() as stack:
        if magic.startswith(_PARQUET):
            # Without these two a whole row group is read ahead, which may be the whole file.
            opened = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER)
            stack.enter_context(opened)
            _check_names(opened.schema_arrow.names, path)
            yield from opened.iter_batches(_BATCH_ROWS, use_threads=False)
            return
        reader = stack.enter_context(
            pyarrow.ipc.open_file(file) if magic == _ARROW_FILE else pyarrow.ipc.open_stream(file)
        )
        _check_names(reader.schema.names, path)
        parts = map(reader.get_batch, range(reader.num_record_batches)) if magic == _ARROW_FILE else reader
        for part in parts:
            part.validate(full=True)  # pyarrow trusts the offsets in a file: damaged ones end the process
            for begin in range(0, part.num_rows, _BATCH_ROWS):
                yield part.slice(begin, _BATCH_ROWS)


def _dated(pyarrow: Any, batch: Any) -> Any:
    """``batch`` with times as texts: Python has no nanoseconds, which pandas writes, and few years."""
    for number, column in enumerate(batch.schema):
        if pyarrow.types.is_timestamp(column.type) or pyarrow.types.is_date(column.type):
            batch = batch.set_column(number, column.name, batch.column(number).cast(pyarrow.string()))
    return batch


def _check_names(names: Sequence[str], path: Path) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"the column {twice[0][:80]!r} is there twice", path, "rename or leave out one of them")


def _row(values: dict[str, Any], row: int) -> RawRow:
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        text = json.dumps(_plain(values), ensure_ascii=False)
    data = text.encode()
    if len(data) > LARGEST_ROW_BYTES:
        return RawRow(None, 0, beginning(data), too_large(data, 0), row)
    return RawRow(None, 0, data, None, row)


def _plain(value: Any) -> Any:
    """``value`` in JSON's types: NaN is null, as pandas means it; times and decimals are texts, bytes their number."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
