"""The same random rows in files of every kind come to the same ids, targets and counts."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared_rows import read_split
from random_rows import Rows

Command = Callable[..., Any]
Objects = list[dict[str, Any]]


def lines(rows: Objects) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(delimiter: str) -> Callable[[Objects], bytes]:
    def write(rows: Objects) -> bytes:
        file = io.StringIO(newline="")
        columns = sorted({key for row in rows for key in row})
        writer = csv.DictWriter(file, columns, delimiter=delimiter, lineterminator="\r\n", quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue().encode()

    return write


def columnar(rows: Objects) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    columns = sorted({key for row in rows for key in row})
    parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in columns}), file)
    return file.getvalue()


KINDS: dict[str, Callable[[Objects], bytes]] = {
    "rows.json": lambda rows: json.dumps(rows).encode(),
    "indented.json": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "one_after_another.json": lambda rows: "".join(json.dumps(row, indent=1) for row in rows).encode(),
    "wrapped.json": lambda rows: json.dumps({"version": "1", "data": rows}).encode(),
    "marked.jsonl": lambda rows: b"\xef\xbb\xbf" + lines(rows),
    "carriage.jsonl": lambda rows: lines(rows).replace(b"\n", b"\r\n"),
    "gaps.jsonl": lambda rows: b"\n \n" + lines(rows).replace(b"\n", b"\n\n"),
    "misnamed.csv": lines,
    "rows.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "misnamed.json": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "rows.csv": table(","),
    "rows.tsv": table("\t"),
    "semicolons.csv": table(";"),
    "rows.csv.gz": lambda rows: gzip.compress(table(",")(rows)),
    "rows.parquet": columnar,
}
TABLES, COLUMNAR = ("rows.csv", "rows.tsv", "semicolons.csv", "rows.csv.gz"), ("rows.parquet",)
"""Kinds in which a value of another type comes back as text, and kinds in which a column has one type."""
COUNTS = ("rows_in", "kept", "dropped_reasons", "refused_reasons", "ignored_keys", "duplicates", "target_tokens")


def prepare(command: Command, path: Path, content: bytes, *options: object) -> Any:
    """The rows and counts, or the exit code."""
    path.write_bytes(content)
    output = path.parent / "out"
    outcome = command(
        "prepare-data", path, "--output", output, "--overwrite", "--json", "--skip-bad-rows", 99, *options
    )
    if outcome.code:
        return outcome.code
    report = json.loads(outcome.stdout)
    return read_split(output), {name: report[name] for name in COUNTS}


def compare(command: Command, tokenizer: Path, directory: Path, seed: int) -> int:
    """How many kinds of file held the rows of this seed."""
    made = Rows(random.Random(seed))
    every = [row for row in (made.row() for _ in range(12)) if row]
    good = [made.well_made() for _ in range(40)]
    groups = [(every, KINDS.keys() - {*TABLES, *COLUMNAR})]
    groups += [([row for row in good if key in row], KINDS.keys()) for key in ("instruction", "question", "text")]
    chats = [{"id": str(n), "messages": made.chat(weights=True)} for n in range(3)]
    groups.append((chats, KINDS.keys() - set(TABLES)))
    options, compared = ("--tokenizer", tokenizer, "--max-seq-length", 4096), 0
    for rows, kinds in groups:
        if not rows:
            continue
        expected = prepare(command, directory / "plain.jsonl", lines(rows), *options)
        for kind in sorted(kinds):
            found = prepare(command, directory / kind, KINDS[kind](rows), *options)
            assert found == expected, (seed, kind)
            compared += 1
    return compared


def test_random_rows_are_the_same_in_every_kind_of_file(
    command: Command, tokenizer_models: dict[str, Path], tmp_path: Path
) -> None:
    assert compare(command, tokenizer_models["bpe"], tmp_path, 0) > 50


@pytest.mark.slow
def test_more_random_rows_are_the_same_in_every_kind_of_file(
    command: Command, tokenizer_models: dict[str, Path], tmp_path: Path
) -> None:
    for seed in range(100, 300):
        compare(command, tokenizer_models["bpe"], tmp_path, seed)
