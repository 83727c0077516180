"""Files that are damaged, compressed, or larger in some part than is read: each is read, or named in one line."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shaped_files import ROWS, columnar, zstd_compress

from llamatune.data.columnar_rows import _WithinFile, columnar_rows
from llamatune.data.json_rows import LISTS
from llamatune.data.raw_row import LARGEST_ROW_BYTES
from llamatune.data.row_files import read_raw_rows
from llamatune.data.row_json import decode_row
from llamatune.errors import DataError


def values(path: Path) -> list[dict[str, Any]]:
    return [decode_row(raw) for raw in read_raw_rows(path)]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize("compress", [gzip.compress, zstd_compress])
def test_columnar_files_are_read_compressed(tmp_path: Path, kind: str, compress: Callable[[bytes], bytes]) -> None:
    path, packed = tmp_path / "rows", compress(columnar(kind))
    path.write_bytes(packed)
    assert values(path) == ROWS
    path.write_bytes(packed[:-9])
    with pytest.raises(DataError, match="the compressed file was cut off"):
        values(path)


def test_zstd_may_begin_with_a_frame_of_no_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"  # as pzstd writes it
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0size" + zstd_compress(b'{"text": "a"}\n'))
    assert values(path) == [{"text": "a"}]


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_damaged_offsets_in_arrow_do_not_end_the_process(tmp_path: Path, kind: str) -> None:
    content, path, refused = columnar(kind, [{"text": f"some text {n}"} for n in range(9)]), tmp_path / "a.arrow", 0
    begin = content.index(b"some text 0")
    for place in range(begin - 64, begin, 4):  # the offsets of the first three texts are there
        damaged = bytearray(content)
        damaged[place + 3] ^= 0x80  # a negative offset
        path.write_bytes(damaged)
        try:
            values(path)
        except DataError as fault:
            assert "the file is damaged or was cut off" in str(fault)
            refused += 1
    assert refused >= 3


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_sizes_in_a_damaged_file_are_not_asked_for(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each eight bytes of the file in turn are a size of 4 GiB; nothing reads more than the file holds."""
    content, asked, given = columnar(kind, [{"text": f"some text {n}"} for n in range(9)]), [0], [0]
    read = _WithinFile.read

    class Noting(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            given.append(len(content) if size is None else size)
            return super().read(size)

    def noted(file: _WithinFile, size: int = -1) -> bytes:
        asked.append(size)
        return read(file, size)

    monkeypatch.setattr(_WithinFile, "read", noted)
    for place in range(0, len(content) - 8, 8):
        damaged = content[:place] + (4 << 30).to_bytes(8, "little") + content[place + 8 :]
        with contextlib.suppress(DataError):
            list(columnar_rows([(Noting(damaged), tmp_path / "rows")]))
    assert max(given) <= len(content)
    assert min(given) >= 0
    if kind == "stream":
        assert max(asked) >= 4 << 30, "pyarrow asked for no such size, so nothing was shown"


@pytest.mark.parametrize("key", LISTS)
def test_a_list_in_the_first_of_several_objects_is_not_the_rows(tmp_path: Path, key: str) -> None:
    """Of objects over several lines; an object alone is around its rows, however large it is."""
    path, rows = tmp_path / "rows.json", [{"text": "a", key: [{"text": "b"}]}, {"text": "c"}, {"text": "d"}]
    path.write_text("\n".join(json.dumps(row, indent=1) for row in rows))
    assert values(path) == rows
    path.write_text(json.dumps({"text": "a", key: rows}, indent=1) + "\n ")
    assert values(path) == rows
    large = [*rows, *[{"text": "e" * (LARGEST_ROW_BYTES // 2)}] * 3]
    path.write_text(json.dumps({key: large}, indent=1))
    assert values(path) == large


@pytest.mark.parametrize("header", [b"text," + b"x" * LARGEST_ROW_BYTES, b"c," * (1 << 20) + b"text"])
def test_a_header_that_is_too_long_is_called_so(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(header + b"\na,b\n")
    with pytest.raises(DataError, match=f"a header of more than 2,097,152 bytes: {path}:1: "):
        values(path)


def test_a_line_of_blanks_is_no_nul_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b" " * (LARGEST_ROW_BYTES + 2) + b"\n")
    (raw,) = read_raw_rows(path)
    assert raw.error is not None
    assert raw.error.message == "the row has more than 2,097,152 bytes"


@pytest.mark.parametrize("field", [b"x", b'"x"', b'"x, ""y""\nz"', b'""""'])
@pytest.mark.parametrize("cut", range(-4, 5))
def test_rows_behind_a_row_of_a_table_that_is_too_long_are_read(tmp_path: Path, field: bytes, cut: int) -> None:
    path, size = tmp_path / "a.csv", LARGEST_ROW_BYTES - LARGEST_ROW_BYTES // 2 - len(field) + cut
    large = b'"' + b"y" * (LARGEST_ROW_BYTES // 2) + b'",' + b"z" * size + b"," + field + b',"last ""one"""'
    path.write_bytes(b"a,b,c,d\n" + large + b"\n1,2,3,4\n5,6,7,8\n")
    first, *others = read_raw_rows(path)
    assert first.error is not None
    assert first.error.kind == "too_large"
    assert [decode_row(raw)["a"] for raw in others] == ["1", "5"]
