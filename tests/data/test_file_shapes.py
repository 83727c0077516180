"""Files as people have them: each shape gives the same rows, or is named as what it is."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import os
import pickle
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shaped_files import (
    BOM,
    LINES,
    LIST,
    ROWS,
    columnar,
    save_dataset,
    sqlite_table,
    table,
    tar_of_rows,
    zip_of,
    zstd_compress,
)

from llamatune.data.raw_row import LARGEST_ROW_BYTES, RawRow, RowError
from llamatune.data.row_files import read_raw_rows
from llamatune.data.row_json import decode_row
from llamatune.errors import DataError, EnvironmentFault


def values(path: Path) -> list[dict[str, Any]]:
    return [decode_row(raw) for raw in read_raw_rows(path)]


def told(path: Path) -> list[str]:
    """The place of each row and what is wrong with it."""

    def of(raw: RawRow) -> str:
        try:
            decode_row(raw)
        except RowError as fault:
            return f"{raw.place('f')}: {fault.message}"
        return raw.place("f")

    return [of(raw) for raw in read_raw_rows(path)]


def refusal(path: Path, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as caught:
        list(read_raw_rows(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


READ: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: LINES,
    "rows.ndjson": lambda: BOM + LINES.replace(b"\n", b"\r\n\r\n"),
    "rows.json": lambda: LIST,
    "spread.JSON": lambda: json.dumps(ROWS, indent=2).encode(),
    "objects.json": lambda: b"\n".join(json.dumps(row, indent=2).encode() for row in ROWS),
    "data.json": lambda: b'{"data": ' + LIST + b"}",
    "more.json": lambda: json.dumps({"version": "1.0", "train": ROWS, "test": ROWS[:2]}, indent=1).encode(),
    "rows.jsonl.gz": lambda: gzip.compress(LINES),
    "two.json.gz": lambda: gzip.compress(LINES[:300]) + gzip.compress(LINES[300:]),
    "called.jsonl": lambda: gzip.compress(BOM + LIST),
    "unpacked.jsonl.gz": lambda: LINES,
    "rows.jsonl.zst": lambda: zstd_compress(LINES[:300]) + zstd_compress(LINES[300:]),
    "rows.csv": lambda: table(end="\n"),
    "excel.csv": lambda: BOM + table(";") + b";;\r\n",
    "separator.csv": lambda: b"sep=;\r\n" + table(";"),
    "rows.tsv.gz": lambda: gzip.compress(table("\t")),
    "rows.parquet": lambda: columnar("parquet"),
    "called.json": lambda: columnar("parquet"),
    "rows.arrow": lambda: columnar("stream"),
    "rows.feather": lambda: columnar("file"),
    "lines.txt": lambda: LINES,
    "-": lambda: LINES,
}


@pytest.mark.parametrize("name", READ)
def test_the_same_rows_come_out_of_every_shape(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(READ[name]())
    assert values(path) == ROWS
    assert [raw.row for raw in read_raw_rows(path)] == list(range(1, 8))


def test_a_saved_data_set_and_its_splits(tmp_path: Path) -> None:
    save_dataset(tmp_path / "shards", [ROWS[:3], ROWS[3:]])
    assert values(tmp_path / "shards") == ROWS
    assert [raw.place("f") for raw in read_raw_rows(tmp_path / "shards")][3:5] == ["f: row 4", "f: row 5"]
    for name, splits in (("train", ["test", "train"]), ("all", ["all"])):
        place = tmp_path / f"of-{name}"
        save_dataset(place / name, [ROWS])
        (place / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
        assert values(place) == ROWS
    notes = list[str]()
    assert list(read_raw_rows(tmp_path / "of-train", notes.append))
    assert notes == ["the rows are those of the split 'train'; left out beside it: 'test'"]
    (tmp_path / "of-all" / "dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    assert f"name one: {tmp_path / 'of-all' / 'a'}" in refusal(tmp_path / "of-all")
    save_dataset(tmp_path / "selected", [ROWS], _indices_data_files=[{"filename": "indices.arrow"}])
    assert "save it again after flatten_indices()" in refusal(tmp_path / "selected")
    for number, named in enumerate(
        ([{"filename": "../rows"}], [{"filename": ".."}], [{"filename": "a\0"}], 7, {"a": 1})
    ):
        save_dataset(tmp_path / f"outside-{number}", [ROWS], _data_files=named)
        assert "names no data files" in refusal(tmp_path / f"outside-{number}")
    for splits in ([".."], ["../x"], [""], 7, "train"):
        (tmp_path / "of-all" / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
        assert "names no splits" in refusal(tmp_path / "of-all")


def test_what_is_left_out_of_an_object_is_told(tmp_path: Path) -> None:
    path, notes = tmp_path / "rows.json", list[str]()
    path.write_text(json.dumps({"test": ROWS[:1], "train": ROWS, "licence": "x"}))
    assert len(list(read_raw_rows(path, notes.append))) == 7
    assert notes == ["the rows are those of 'train'; left out beside it: 'test', 'licence'"]
    for text in ('{"messages": [{"role": "user"}]}', '{\n "messages": [{"role": "user"}]\n}', '{"data": ["a"]}'):
        path.write_text(text)  # a row, however it is written
        assert values(path) == [json.loads(text)]


def test_a_document_of_a_text_ends_at_a_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(BOM + "One café\r\n  of two.\r\n\r\n \nTwo\u2028{name}\n\n\n[1] Three".encode())
    assert [row["text"] for row in values(path)] == ["One café\n  of two.", "Two\u2028{name}", "[1] Three"]
    assert told(path) == ["f:1", "f:5: row 2", "f:8: row 3"]
    path.write_bytes(b"Prose.\n\n" + LINES + b"\ncaf\xe9\n\n" + b"long\n" * (LARGEST_ROW_BYTES // 5 + 1))
    assert [text.split(": ", 2)[-1] for text in told(path)] == [
        "f:1", "a JSON row in a file that begins as plain text (is it JSON Lines? then every line is a row)",
        "byte 0xe9 of the document is not UTF-8 (Latin-1 text? iconv converts it)",
        "the document has more than 2,097,152 bytes without a blank line"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b,a\n1,2,3\n", ":1: rename or leave out one of them"),
        (b",a,b\n0,1,2\n", "column 1 has no name in the header"),
        (b'\n"a,b\n', "the header cannot be read"),
        ("é,b\n1,2\n".encode("latin-1"), "the header is not UTF-8"),
        (b"a,b\rc,d\r", "its lines end in carriage returns alone"),
        ("a,b\ncafé,d\n".encode("utf-16"), "UTF-16 text"),
    ],
)
def test_a_header_must_name_each_column_once(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    assert message in refusal(tmp_path / "rows.csv")


def test_rows_of_a_table_have_the_fields_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = b"x" * (LARGEST_ROW_BYTES + 1)
    path.write_bytes(b'a,b\n"1\n2",3\n\n4\n5,6,7\n"8"9,10\ncaf\xe9,11\n' + long + b',12\n13,14\n15,"16\n17,18\n')
    assert told(path) == [
        "f:2: row 1",
        "f:5: row 2: 1 field where the header names 2",
        "f:6: row 3: 3 fields where the header names 2",
        "f:7: row 4: not valid CSV: ',' expected after '\"' (a quote within a field is written twice)",
        "f:8: row 5: byte 0xe9 of the row is not UTF-8 (Latin-1 text? iconv converts it)",
        "f:9: row 6: the row has more than 2,097,152 bytes",
        "f:10: row 7",
        "f:11: row 8: a quote is not closed: the file was cut short, or a quote within a field is not doubled",
    ]
    path.write_bytes(b"a,b\n")
    assert told(path) == []


NAMED: list[tuple[str, Callable[[], bytes], str]] = [
    ("rows.zip", lambda: zip_of("rows.jsonl"), "a zip archive, not a file of rows"),
    ("rows.csv", lambda: zip_of("[Content_Types].xml", "xl/workbook.xml"), "a spreadsheet (.xlsx)"),
    ("text.txt", lambda: zip_of("word/document.xml"), "a Word document (.docx)"),
    ("model.pt", lambda: zip_of("archive/data.pkl"), "a PyTorch file"),
    ("rows.xls", lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 9, "an Office file of an old kind"),
    ("rows.db", sqlite_table, "an SQLite database"),
    ("rows.jsonl.gz", lambda: gzip.compress(gzip.compress(LINES)), "compressed twice"),
    ("rows.pdf", lambda: b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document"),
    ("rows.jsonl", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ("rows.json", lambda: b"\n<!DOCTYPE html>\n<html>", "an HTML page"),
    ("rows.tar.gz", tar_of_rows, "a tar archive"),
    ("rows.jsonl.bz2", lambda: bz2.compress(LINES), "compressed by bzip2"),
    ("rows.jsonl.xz", lambda: lzma.compress(LINES), "compressed by xz"),
    ("rows.pkl", lambda: pickle.dumps(ROWS), "a Python pickle (it can run code, so it is not opened)"),
    ("rows.png", lambda: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "an image (PNG)"),
    ("rows.safetensors", lambda: struct.pack("<Q", 8) + b'{"a":{}}', "a safetensors file"),
    ("rows.xml", lambda: b'<?xml version="1.0"?><rows/>', "XML, not a file of rows"),
    ("rows.parquet", lambda: LINES[1:], "the file is not what .parquet files hold"),
    ("rows.arrow", lambda: b"", "the file is empty"),
    ("cut.parquet", lambda: columnar("parquet")[:-9], "the file is damaged or was cut off"),
    ("cut.arrow", lambda: columnar("stream")[:-150], "the file is damaged or was cut off, behind row 6"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), NAMED, ids=[f"{kind[0]}-{kind[2][:12]}" for kind in NAMED])
def test_what_holds_no_rows_is_named(tmp_path: Path, name: str, content: Callable[[], bytes], message: str) -> None:
    (tmp_path / name).write_bytes(content())
    assert message in refusal(tmp_path / name)


@pytest.mark.parametrize("text", ["BZh is bzip2's mark.", "RIFF, GIF8, PK", "Rar!", "ORC", "version 2", "<b>html</b>"])
def test_a_text_may_begin_like_a_mark(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert values(tmp_path / "a.txt") == [{"text": text}]


@pytest.mark.parametrize(("ending", "compress"), [("gz", gzip.compress), ("zst", zstd_compress)])
def test_a_compressed_file_that_was_cut_off_names_the_last_whole_row(
    tmp_path: Path, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    numbers = random.Random(1)
    rows = [{"text": f"{numbers.random()} stones"} for _ in range(9000)]
    for content in ("".join(json.dumps(row) + "\n" for row in rows), json.dumps(rows)):
        packed, path = compress(content.encode()), tmp_path / f"rows.{ending}"
        path.write_bytes(packed[: len(packed) // 2])
        seen, message = list[Any](), ""
        try:
            seen.extend(decode_row(raw) for raw in read_raw_rows(path))
        except DataError as fault:
            message = str(fault)
        assert seen == rows[: len(seen)]
        assert 100 < len(seen) < len(rows)
        assert f"was cut off; the last whole row before that is row {len(seen)}: {path}" in message
        path.write_bytes(packed[:9])
        assert "was cut off; the last whole row before that is row 0" in refusal(path)
    damaged = bytearray(gzip.compress(LINES))
    damaged[-5] ^= 1  # in the checksum
    (tmp_path / "rows.gz").write_bytes(damaged)
    assert "the compressed file is damaged" in refusal(tmp_path / "rows.gz")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_a_bomb_is_read_in_bounded_memory(tmp_path: Path, name: str) -> None:
    begin = {"a.jsonl": b'{"text": "', "a.json": b'[{"text": "', "a.csv": b'text\n"', "a.txt": b""}[name]
    path = tmp_path / f"{name}.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(begin)
        for _ in range(24):
            file.write(b"x" * (1 << 20))
    assert path.stat().st_size < 1 << 18
    tracemalloc.start()
    raws = list(read_raw_rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * LARGEST_ROW_BYTES
    assert all(raw.error is not None and len(raw.data) <= 1000 for raw in raws)


def test_a_missing_package_is_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    (tmp_path / "a.zst").write_bytes(b"\x28\xb5\x2f\xfd....")
    for name in ("pyarrow", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(importlib.import_module("sys").modules, name, None)
    for name, package in (("a.parquet", "pyarrow"), ("a.zst", "backports.zstd")):
        assert f"pip install {package}" in refusal(tmp_path / name, EnvironmentFault)


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    moment = importlib.import_module("datetime").date(2026, 1, 2)
    row = {"text": "a", "score": float("nan"), "at": moment, "image": {"bytes": b"abc"}, "deep": [{"x": [1.5, None]}]}
    (tmp_path / "a.parquet").write_bytes(columnar("parquet", [row]))
    assert values(tmp_path / "a.parquet") == [
        {"text": "a", "score": None, "at": "2026-01-02", "image": {"bytes": "3 bytes"}, "deep": [{"x": [1.5, None]}]}
    ]


def test_times_of_any_resolution_are_texts(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra data)")
    path, write = tmp_path / "a.parquet", importlib.import_module("pyarrow.parquet").write_table
    moment = pyarrow.array([1_700_000_000_123_456_789], pyarrow.timestamp("ns"))
    write(pyarrow.table({"at": moment, "on": pyarrow.array([-1_000_000], pyarrow.date32())}), path)
    assert values(path) == [{"at": "2023-11-14 22:13:20.123456789", "on": "-0768-02-04"}]
    write(pyarrow.table({"deep": pyarrow.StructArray.from_arrays([moment], ["at"])}), path)
    assert "a value cannot be read (Nanosecond" in refusal(path)


def test_a_directory_that_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(LINES)
    assert "a directory where a file, or a data set of save_to_disk, is expected" in refusal(tmp_path)
    assert "name the files in it (rows.jsonl)" in refusal(tmp_path)
    os.chmod(tmp_path / "rows.jsonl", 0)
    if os.geteuid() != 0:  # root reads it all the same
        assert "cannot open" in refusal(tmp_path / "rows.jsonl", EnvironmentFault)
