"""Batches of prepared rows: token ids, labels and lengths of samples one after another, without padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llamatune.errors import DataError
from llamatune.formats.manifest import Manifest
from llamatune.formats.prepared import SplitFile, read_prepared_manifest, split_path
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


class Split(SplitFile):
    """The rows of one file of a prepared directory, memory-mapped."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._starts, self._rows = self.row_starts(), self.column("source_rows")
        with safe_open(path, framework="pt") as file:
            self._ids, self._mask = file.get_tensor("input_ids"), file.get_tensor("loss_mask")
        before = torch.cat((torch.zeros(1, dtype=torch.int64), self._mask.cumsum(0)))
        self.target_counts: list[int] = before[self._starts].diff().tolist()
        if self.target_counts and min(self.target_counts) == 0:
            raise DataError("a row has no target token", path, "prepare the data again")

    @property
    def largest_id(self) -> int:
        return int(self._ids.max()) if len(self._ids) else -1

    @property
    def lengths(self) -> list[int]:
        return [end - start for start, end in itertools.pairwise(self._starts)]

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows at ``indices``, in that order."""
        spans = [slice(self._starts[i], self._starts[i + 1]) for i in indices]
        input_ids = torch.cat([self._ids[span] for span in spans]).long()
        targets = torch.cat([self._mask[span] for span in spans]).bool()
        return Batch(
            input_ids[None],
            torch.where(targets, input_ids, IGNORED)[None],
            tuple(span.stop - span.start for span in spans),
            tuple(self._rows[i] for i in indices),
            sum(self.target_counts[i] for i in indices),
        )

    def batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Every row once (or the first ``limit``), in the file's order, ``size`` at a time."""
        rows = len(self) if limit is None else min(limit, len(self))
        for start in range(0, rows, size):
            yield self.batch(range(start, min(start + size, rows)))


@dataclass(frozen=True)
class Prepared:
    """A prepared directory: its splits and its manifest."""

    train: Split
    validation: Split | None
    manifest: Manifest


def open_prepared(path: Path) -> Prepared:
    """Open a directory that ``prepare-data`` wrote; anything else is a ``DataError``."""
    manifest, validation = read_prepared_manifest(path), split_path(path, "validation")
    return Prepared(Split(split_path(path, "train")), Split(validation) if validation.exists() else None, manifest)
