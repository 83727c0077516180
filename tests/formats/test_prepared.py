"""A split of a prepared directory: written and read back, and refused where it does not fit."""

from __future__ import annotations

from array import array
from pathlib import Path

import pytest

from llamatune.errors import DataError
from llamatune.formats.manifest import Staging
from llamatune.formats.prepared import SplitFile, read_lengths, split_path, write_split
from llamatune.formats.safetensors import write_safetensors


def write(directory: Path, lengths: list[int] | None = None, tokens: int = 5) -> Path:
    ids = array("i", range(10, 10 + tokens)).tobytes()
    mask = (b"\0\1" * tokens)[:tokens]
    write_split(Staging(directory), "train", lengths or [2, 3], array("q", [1, 4]), [ids[:4], ids[4:]], [mask])
    return split_path(directory, "train")


def test_a_split_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    split = SplitFile(write(tmp_path))
    assert len(split) == 2
    assert split.row_starts() == [0, 2, 5]
    assert split.column("source_rows").tolist() == [1, 4]
    assert split.column("input_ids", 2, 5).tolist() == [12, 13, 14]
    assert split.column("loss_mask", 0, 2).tolist() == [0, 1]
    assert read_lengths(tmp_path) == ([2, 3], [1, 1])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda raw: raw.replace(b"loss_mask", b"lost_mask"), "not a file that prepare-data wrote"),
        (lambda raw: raw.replace(b'"shape":[2]', b'"shape":[1,2]'), "do not fit each other"),
    ],
)
def test_a_file_with_other_tensors_is_refused(tmp_path: Path, change: object, match: str) -> None:
    path = write(tmp_path)
    raw = change(path.read_bytes())  # type: ignore[operator]
    header_bytes = raw.index(b"}}") + 2
    header = raw[8:header_bytes] + b" " * (-(header_bytes - 8) % 8)
    data = raw[-(5 * 4 + 5 + 3 * 8 + 2 * 8) :]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    with pytest.raises(DataError, match=match):
        SplitFile(path)


def test_row_offsets_that_do_not_rise_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [0, 5])
    with pytest.raises(DataError, match="row offsets do not fit the tokens"):
        read_lengths(tmp_path)


def test_a_split_of_another_schema_is_refused(tmp_path: Path) -> None:
    tensors = [("offsets", "I64", (1,)), ("source_rows", "I64", (0,)), ("input_ids", "I32", (0,)), ("loss_mask", "U8", (0,))]  # fmt: skip  # noqa: E501
    for schema in ("1", "2"):
        path = tmp_path / f"{schema}.safetensors"
        write_safetensors(Staging(tmp_path), path.name, tensors, [bytes(8)], {"schema": schema})
        if schema == "1":
            assert len(SplitFile(path)) == 0
        else:
            with pytest.raises(DataError, match="schema 2"):
                SplitFile(path)
