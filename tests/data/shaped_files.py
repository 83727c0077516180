"""Files as people have them, made of the same few rows."""

from __future__ import annotations

import csv
import importlib
import io
import json
import sqlite3
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROWS = [
    {"instruction": f"Say {n}.", "input": "", "output": f'"{n}", é\u2028 it\nis; never\t{n + 1}, or so.'}
    for n in range(1, 8)
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS).encode()
BOM = b"\xef\xbb\xbf"


def zstd_compress(data: bytes) -> bytes:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name).compress(data)  # type: ignore[no-any-return]
        except ImportError:
            continue
    pytest.skip("zstd is not installed (the extra data)")


def table(separator: str = ",", end: str = "\r\n") -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator=end)
    writer.writerow(ROWS[0])
    writer.writerows(row.values() for row in ROWS)
    return text.getvalue().encode()


def columnar(kind: str, rows: list[dict[str, Any]] = ROWS) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the extra data)")
    parquet = importlib.import_module("pyarrow.parquet")
    out, made = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        parquet.write_table(made, out)
        return out.getvalue()
    opened = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with opened(out, made.schema) as writer:
        writer.write_table(made, max_chunksize=3)
    return out.getvalue()


def save_dataset(directory: Path, shards: list[list[dict[str, Any]]], **state: Any) -> None:
    directory.mkdir(parents=True)
    names = [f"data-{n:05}-of-{len(shards):05}.arrow" for n in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        (directory / name).write_bytes(columnar("stream", rows))
    state = {"_data_files": [{"filename": name} for name in names], "_split": None, **state}
    (directory / "state.json").write_text(json.dumps(state))
    (directory / "dataset_info.json").write_text("{}")


def zip_of(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return out.getvalue()


def tar_of_rows() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"))
    return out.getvalue()


def sqlite_table() -> bytes:
    base = sqlite3.connect(":memory:")
    base.execute("create table t (a)")
    return base.serialize()
