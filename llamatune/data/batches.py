"""Batches of prepared rows: token ids, labels and lengths of samples one after another, without padding."""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from llamatune.errors import DataError
from llamatune.formats.file_schema import LARGEST_WHOLE
from llamatune.formats.manifest import Manifest
from llamatune.formats.prepared import SplitFile, has_prompts, read_prepared_manifest, split_path
from llamatune.model.loss import IGNORED


@dataclass(frozen=True)
class Batch:
    """Samples one after another in one row, without padding.

    ``input_ids`` and ``labels`` are (1, N) int64; a label is the id at its own position, or -100 (the model predicts
    the label at position t from position t-1). ``lengths`` are tokens of the samples, ``rows`` their row numbers in the
    input files.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    target_tokens: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class _SplitInMemory(SplitFile):
    """One file of a split, memory-mapped. ``rows_before``: how many input rows are counted before its own."""

    def __init__(self, path: Path, rows_before: int) -> None:
        super().__init__(path)
        self.rows_before = rows_before
        self.starts, self.source_rows = self.row_starts(), self.column("source_rows")
        with safe_open(path, framework="pt") as file:
            self.ids, self.mask = file.get_tensor("input_ids"), file.get_tensor("loss_mask")
        self._check_values()
        before = torch.cat((torch.zeros(1, dtype=torch.int64), self.mask.cumsum(0)))
        self.target_counts: list[int] = before[self.starts].diff().tolist()
        if self.target_counts and min(self.target_counts) == 0:
            raise DataError("a row has no target token", path, "prepare the data again")

    def _check_values(self) -> None:
        if len(self.ids) and (least := int(self.ids.min())) < 0:
            self._refuse(f"holds the token id {least}")
        if len(self.mask) and (most := int(self.mask.max())) > 1:
            self._refuse(f"its loss_mask holds {most}, where only 0 and 1 can be")
        if len(self.source_rows) and not 0 <= min(self.source_rows) <= max(self.source_rows) < LARGEST_WHOLE:
            self._refuse("its source_rows hold a number that counts no row")

    def _refuse(self, what: str) -> None:
        raise DataError(what, self.path, "prepare the data again")


class Split:
    """The rows of one file of a prepared directory, or of several files, one after the other.

    ``rows_before`` (each file's, default 0) is added to its row numbers.
    """

    def __init__(self, *paths: Path, rows_before: Sequence[int] | None = None) -> None:
        before = [0] * len(paths) if rows_before is None else rows_before
        self.files = [_SplitInMemory(path, rows) for path, rows in zip(paths, before, strict=True)]
        self._ends = list(itertools.accumulate(map(len, self.files)))
        self.target_counts = [count for file in self.files for count in file.target_counts]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def largest_id(self) -> int:
        return max(int(file.ids.max()) if len(file.ids) else -1 for file in self.files)

    @property
    def lengths(self) -> list[int]:
        return [end - start for file in self.files for start, end in itertools.pairwise(file.starts)]

    def rows_of_ids(self) -> Iterator[NDArray[np.int32]]:
        """The token ids of each row, in mapped memory."""
        for file in self.files:
            ids = file.ids.numpy()
            for start, end in itertools.pairwise(file.starts):
                yield ids[start:end]

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows at ``indices``, in that order."""
        places = [self._place(index) for index in indices]
        spans = [slice(file.starts[at], file.starts[at + 1]) for file, at in places]
        input_ids = torch.cat([file.ids[span] for (file, _), span in zip(places, spans, strict=True)]).long()
        targets = torch.cat([file.mask[span] for (file, _), span in zip(places, spans, strict=True)]).bool()
        return Batch(
            input_ids[None],
            torch.where(targets, input_ids, IGNORED)[None],
            tuple(span.stop - span.start for span in spans),
            tuple(file.rows_before + file.source_rows[at] for file, at in places),
            sum(self.target_counts[i] for i in indices),
        )

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Every row once (or the first ``limit``), in the file's order, ``size`` at a time."""
        rows = len(self) if limit is None else min(limit, len(self))
        for start in range(0, rows, size):
            yield self.batch(range(start, min(start + size, rows)))

    def _place(self, index: int) -> tuple[_SplitInMemory, int]:
        """The file of a row, and its index there."""
        number = bisect_right(self._ends, index)
        file = self.files[number]
        return file, index - self._ends[number] + len(file)


@dataclass(frozen=True)
class Prepared:
    """One prepared directory, or several of one tokenizer: their splits and manifests, in the order given."""

    train: Split
    validation: Split | None
    manifests: tuple[Manifest, ...]

    @property
    def manifest(self) -> Manifest:
        """That of the first directory whose rows have prompts; its template is the one that makes prompts."""
        return next((found for found in self.manifests if has_prompts(found.template)), self.manifests[0])

    @property
    def digest(self) -> str | list[str]:
        """Identifies the data: the manifest's digest, or all of them in order."""
        digests = [manifest.digest for manifest in self.manifests]
        return digests[0] if len(digests) == 1 else digests


def open_prepared(*paths: Path) -> Prepared:
    """Open directories that ``prepare-data`` wrote; anything else is a ``DataError``, and so is another tokenizer.

    Row numbers count on from one directory to the next, by the rows that were read for each.
    """
    manifests = tuple(map(read_prepared_manifest, paths))
    places = list(map(os.path.realpath, paths))
    if twice := next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None):
        raise DataError("the same directory is given twice", twice, "name each directory once")
    refuse_disagreement(manifests)
    read = [_rows_read(manifest) for manifest in manifests]
    before = [sum(read[:number]) for number in range(len(read))]
    files = [split_path(path, "validation") for path in paths]
    held = [number for number, file in enumerate(files) if file.exists()]
    validation = Split(*(files[n] for n in held), rows_before=[before[n] for n in held]) if held else None
    train = Split(*(split_path(path, "train") for path in paths), rows_before=before)
    for manifest, file in zip(manifests, train.files, strict=True):
        _refuse_other_counts(manifest, "train", file)
    for number, file in zip(held, validation.files if validation else (), strict=True):
        _refuse_other_counts(manifests[number], "validation", file)
    return Prepared(train, validation, manifests)


def _refuse_other_counts(manifest: Manifest, split: str, file: _SplitInMemory) -> None:
    """Raise ``DataError`` where the manifest counts other rows or tokens than its file holds."""
    told = (manifest.facts.get("splits") or {}).get(split, {})
    held = {"rows": len(file), "tokens": len(file.ids), "target_tokens": sum(file.target_counts)}
    for name, count in held.items():
        if told.get(name, count) != count:
            what = f"splits.{split}.{name} is {told[name]}, and the file holds {count}"
            raise DataError(what, f"{manifest.path}, facts", "prepare the data again")


def refuse_disagreement(manifests: Sequence[Manifest]) -> None:
    """Raise ``DataError`` where rows were prepared with different tokenizers."""
    first, *others = manifests
    for manifest in others:
        for name, value in _tokenizer_facts(manifest).items():
            expected = _tokenizer_facts(first)[name]
            if value != expected:
                what = f"prepared with another tokenizer than {first.path.parent}: {name} {value}, not {expected}"
                raise DataError(what, manifest.path.parent, "prepare all of the data with one tokenizer")


def _tokenizer_facts(manifest: Manifest) -> dict[str, Any]:
    facts = manifest.facts.get("tokenizer")
    given = facts if isinstance(facts, dict) else {}
    return {name: given.get(name) for name in ("fingerprint", "bos_id", "eos_id")}


def _rows_read(manifest: Manifest) -> int:
    rows = manifest.facts.get("rows_in")
    return rows if isinstance(rows, int) else 0
