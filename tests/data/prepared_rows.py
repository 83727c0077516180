"""Rows to prepare, and prepared rows read back without our own reader."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from llamatune.formats.safetensors import read_header


def alpaca(number: int, **changes: Any) -> dict[str, Any]:
    """An alpaca row that differs from every other number's."""
    return {"instruction": f"Count {number} apples", "input": "", "output": f"There are {number}.", **changes}


def read_split(directory: Path, name: str = "train") -> list[tuple[list[int], list[int], int]]:
    """(ids, mask, source row) of every row of a split, read without our own reader of rows."""
    path = directory / f"{name}.safetensors"
    entries, _ = read_header(path)
    raw = path.read_bytes()
    columns = {}
    for key, typecode in (("offsets", "q"), ("source_rows", "q"), ("input_ids", "i"), ("loss_mask", "B")):
        columns[key] = array(typecode)
        columns[key].frombytes(raw[entries[key].begin : entries[key].end])
    spans = zip(columns["offsets"], columns["offsets"][1:], strict=False)
    return [
        (columns["input_ids"][a:b].tolist(), columns["loss_mask"][a:b].tolist(), row)
        for (a, b), row in zip(spans, columns["source_rows"], strict=True)
    ]
