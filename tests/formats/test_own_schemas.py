"""Manifests, benchmark cells and prepared rows with values that cannot be: refused by file and key."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from llamatune.benchmarking.results import CATEGORIES
from llamatune.data.batches import open_prepared
from llamatune.errors import CheckpointError, DataError, LlamatuneError
from llamatune.formats.benchmark_cell import MeasuredCell, read_cell
from llamatune.formats.manifest import MANIFEST, find_manifest
from llamatune.formats.metrics_lines import check_line
from llamatune.formats.prepared import read_lengths

ABSURD = ["", "x", -1, 1 << 53, 1 << 70, 10**400, -1e308, [], {}, [[]], True]
RAW = ["NaN", "-Infinity", "1e999", "9" * 4000, "9" * 5000]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value within ``value``."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at ``path``."""
    made = json.loads(json.dumps(value))
    inner = made
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return made


def test_any_value_of_a_prepared_manifest_is_read_or_refused_in_one_line(
    prepared: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared(), data)
    raw, refused = json.loads((data / MANIFEST).read_text()), 0
    for path in places(raw):
        for new in ABSURD:
            (data / MANIFEST).write_text(json.dumps(changed(raw, path, new)))
            try:
                open_prepared(data)
            except LlamatuneError as fault:
                refused += 1
                assert fault.exit_code in (3, 4)
                assert str(data) in str(fault)
        for text in RAW:
            marked = json.dumps(changed(raw, path, "MARK")).replace('"MARK"', text)
            (data / MANIFEST).write_text(marked)
            with pytest.raises(LlamatuneError, match=str(data)):
                open_prepared(data)
    assert refused > 500


@pytest.mark.parametrize(
    ("path", "new", "key"),
    [
        (("facts", "rows_in"), -1, "rows_in"),
        (("facts", "splits", "train", "rows"), 7_000_000, "splits.train.rows"),
        (("facts", "splits", "train", "tokens"), 0, "splits.train.tokens"),
        (("facts", "tokenizer", "eos_id"), True, "tokenizer.eos_id"),
        (("facts", "unknown"), 1, "unknown"),
        (("extra",), 1, "extra"),
        (("schema",), True, "not the manifest"),
        (("inputs",), [], "inputs"),
    ],
)
def test_the_key_is_named(
    prepared: Callable[..., Path], tmp_path: Path, path: tuple[str, ...], new: Any, key: str
) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared(), data)
    raw = json.loads((data / MANIFEST).read_text())
    (data / MANIFEST).write_text(json.dumps(changed(raw, path, new)))
    with pytest.raises(DataError, match=f"{key}.*{MANIFEST}"):
        open_prepared(data)


def ids(tensors: dict[str, Any]) -> None:
    tensors["input_ids"][3] = -7


def mask(tensors: dict[str, Any]) -> None:
    tensors["loss_mask"][-1] = 2


def rank(tensors: dict[str, Any]) -> None:
    tensors["loss_mask"] = tensors["loss_mask"][None]


def numbers(tensors: dict[str, Any]) -> None:
    tensors["source_rows"][0] = -(1 << 63)


def offsets(tensors: dict[str, Any]) -> None:
    tensors["offsets"][1] = 1 << 40


@pytest.mark.parametrize("change", [ids, mask, rank, numbers, offsets])
def test_prepared_values_that_cannot_be_are_refused(
    prepared: Callable[..., Path], tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared(), data)
    file = data / "train.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(DataError, match=str(file)):
        open_prepared(data)
    if change in (mask, rank, offsets):
        with pytest.raises(DataError, match=str(file)):
            read_lengths(data)


def cell() -> dict[str, Any]:
    """A measured cell."""
    made: dict[str, Any] = dict.fromkeys(MeasuredCell.model_fields, 1)
    lists = {"losses": [1.5], "held_out_losses": [], "step_s_range": [0.5, 1.0]}
    texts = {"device": "cpu", "device_name": "cpu", "torch": "2", "status": "measured"}
    return {**made, **lists, **texts, "values": {"lora": "on"}, "categories": dict.fromkeys(CATEGORIES, 4)}


def test_a_cell_is_read_whole_or_refused_by_its_key(tmp_path: Path) -> None:
    path, raw = tmp_path / "cell.json", cell()
    path.write_text(json.dumps(raw))
    assert read_cell(path, 1) == {name: value for name, value in raw.items() if name != "values"}
    for name in raw:
        for new in ("x", -(1 << 53), 10**400, [[]], True):
            if (name, new) in [(text, "x") for text in ("device", "device_name", "torch")]:
                continue
            path.write_text(json.dumps({**raw, name: new}))
            with pytest.raises(CheckpointError, match=str(path)):
                read_cell(path, 1)
        path.write_text(json.dumps({key: value for key, value in raw.items() if key != name}))
        with pytest.raises(CheckpointError, match=name):
            read_cell(path, 1)
    for change in (
        {"categories": {"gradients": 4}},
        {"held_out_losses": [1.0, 2.0]},
        {"allocated_bytes": 0},
        {"step_s": 0},
    ):
        path.write_text(json.dumps({**raw, **change}))
        with pytest.raises(CheckpointError, match=next(iter(change))):
            read_cell(path, 1)
    path.write_text(json.dumps({**raw, "step_s": 10**40}))
    assert isinstance(read_cell(path, 1)["step_s"], float), "charts refuse whole numbers that are so large"
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="losses has 1 numbers for 2 seeds"):
        read_cell(path, 2)


def test_a_huge_whole_number_of_a_log_line_is_read_as_a_float() -> None:
    line = {"event": "eval", "step": 1, "loss": 10**40, "perplexity": 2.0}
    read = check_line(line)
    assert read == {**line, "loss": 1e40}
    assert isinstance(read["loss"], float)


def test_a_number_without_end_in_any_products_manifest_is_refused(tmp_path: Path) -> None:
    facts = {"report": {"max_abs_error": "MARK"}}
    files = {"a": {"bytes": 1, "sha256": "0" * 64}}
    whole = {"kind": "merged", "schema": 1, "inputs": {}, "facts": facts, "files": files}
    for text in RAW:
        (tmp_path / MANIFEST).write_text(json.dumps(whole).replace('"MARK"', text))
        with pytest.raises(CheckpointError, match=MANIFEST):
            find_manifest(tmp_path)
