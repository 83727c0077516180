"""Prepared directories, which ``prepare-data`` writes: token ids, loss mask and row offsets in safetensors. No torch.

A split is one file, ``train.safetensors`` or ``validation.safetensors``, with the tensors of ``COLUMNS``. ``offsets``
(rows + 1) say where each row begins and ends in ``input_ids`` and ``loss_mask`` (tokens; 1: the token is a target), and
``source_rows`` (rows) are the row numbers in the input files, from 1. The facts in the manifest say how rows were read.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llamatune.errors import DataError
from llamatune.events import ShouldStop, never_stop
from llamatune.formats import manifest
from llamatune.formats.manifest import Manifest, Staging, find_manifest, refuse_altered_manifest, verify_product
from llamatune.formats.safetensors import read_header, write_safetensors
from llamatune.safe_reading import open_regular

KIND = "prepared"
SCHEMA = "1"
"""Of a split, in the metadata of its file; a file without it, as they are written today, is of schema 1."""
COLUMNS = {"offsets": ("I64", "q"), "source_rows": ("I64", "q"), "input_ids": ("I32", "i"), "loss_mask": ("U8", "B")}
"""Each tensor's dtype and its code for ``array``, in the order in the file: the widest first, so each is aligned."""


AT_ONCE_BYTES = 64 << 20
"""Rows up to this size (some 50 ms) are compared with their digests before they are used, larger ones meanwhile."""


def split_path(directory: Path, split: str) -> Path:
    """The file of ``train`` or ``validation``."""
    return directory / f"{split}.safetensors"


def write_split(
    staging: Staging,
    split: str,
    lengths: Iterable[int],
    source_rows: array[int],
    input_ids: Iterable[bytes],
    loss_mask: Iterable[bytes],
) -> None:
    """Write one split. ``lengths`` are the rows' tokens; ids (int32) and mask come as bytes in any portions."""
    offsets = array("q", itertools.accumulate(lengths, initial=0))
    counts = {"offsets": len(offsets), "source_rows": len(source_rows)}
    tensors = [(name, dtype, (counts.get(name, offsets[-1]),)) for name, (dtype, _) in COLUMNS.items()]
    data = itertools.chain([offsets.tobytes(), source_rows.tobytes()], input_ids, loss_mask)
    write_safetensors(staging, split_path(staging.path, split).name, tensors, data)


class SplitFile:
    """One split, its header checked; columns are read when they are asked for.

    Raises:
        DataError: not a split, of another schema, or its tensors do not fit each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries, metadata = read_header(path, DataError)
        if metadata.get("schema", SCHEMA) != SCHEMA:
            raise DataError(f"written by another version (schema {metadata['schema']})", path, "prepare the data again")
        dtypes = {name: dtype for name, (dtype, _) in COLUMNS.items()}
        if {name: entry.dtype for name, entry in self._entries.items()} != dtypes:
            raise DataError("not a file that prepare-data wrote", path, "prepare the data again")
        shapes = {name: entry.shape for name, entry in self._entries.items()}
        tokens, rows = shapes["input_ids"], shapes["source_rows"]
        flat = len(tokens) == len(rows) == 1
        if not flat or shapes["loss_mask"] != tokens or shapes["offsets"] != (rows[0] + 1,):
            raise DataError("its tensors do not fit each other", path, "prepare the data again")

    def __len__(self) -> int:
        return self._entries["source_rows"].shape[0]

    def column(self, name: str, begin: int = 0, end: int | None = None) -> array[int]:
        """Elements ``begin:end`` of one tensor."""
        values: array[int] = array(COLUMNS[name][1])
        entry = self._entries[name]
        last = entry.end if end is None else entry.begin + end * values.itemsize
        with open_regular(self.path, DataError) as file:
            file.seek(entry.begin + begin * values.itemsize)
            values.frombytes(file.read(last - file.tell()))
        return values

    def row_starts(self) -> list[int]:
        """Where each row begins in the tokens, and where the last one ends; ``DataError`` if one is empty."""
        starts = self.column("offsets").tolist()
        ordered = all(begin < end for begin, end in itertools.pairwise(starts))
        if starts[:1] != [0] or (starts[-1],) != self._entries["input_ids"].shape or not ordered:
            raise DataError("row offsets do not fit the tokens", self.path, "prepare the data again")
        return starts


def read_lengths(*directories: Path) -> tuple[list[int], list[int]]:
    """Tokens and target tokens of each training row; ``DataError`` if one has no target."""
    lengths, targets = list[int](), list[int]()
    for directory in directories:
        split = SplitFile(split_path(directory, "train"))
        rows, mask = list(itertools.pairwise(split.row_starts())), split.column("loss_mask").tobytes()
        if mask.translate(None, b"\0\1"):
            raise DataError("its loss_mask holds more than 0 and 1", split.path, "prepare the data again")
        lengths += [end - begin for begin, end in rows]
        targets += [mask.count(1, begin, end) for begin, end in rows]
        if not all(targets):
            raise DataError("a row has no target token", split.path, "prepare the data again")
    return lengths, targets


def has_prompts(template: Mapping[str, Any] | None) -> bool:
    """Whether a stored template makes prompts; that of text rows is empty."""
    return template is not None and bool(template.get("prompt") or "chat_template" in template)


def read_prepared_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared directory; ``DataError`` if it is none, or of another schema."""
    found = find_manifest(directory, DataError)
    if found is None or found.kind != KIND:
        what = "not a prepared directory" if directory.exists() else "no such directory"
        raise DataError(what, directory, "make one with llamatune prepare-data")
    if found.schema != manifest.SCHEMA:
        raise DataError(f"written by another version (schema {found.schema})", directory, "prepare the data again")
    return found


def verify_rows(*directories: Path, at_most_bytes: int | None = None, should_stop: ShouldStop = never_stop) -> None:
    """Compare every byte of prepared directories with their manifests, of those up to ``at_most_bytes``.

    Raises:
        DataError: not a prepared directory. CheckpointError: a file is not what the manifest says.
        Stopped: ``should_stop`` said so.
    """
    for directory in directories:
        size = read_prepared_manifest(directory).bytes
        if at_most_bytes is None or size <= at_most_bytes:
            verify_product(directory, should_stop=should_stop)
            refuse_altered_manifest(directory)
