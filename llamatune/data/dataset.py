"""Batches from a prepared directory, in an order that is a function of (seed, epoch)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llamatune.data.tokenizer import load_tokenizer
from llamatune.errors import CheckpointError, DataError
from llamatune.events import Notice, OnEvent
from llamatune.formats.manifest import Manifest
from llamatune.formats.prepared import COLUMNS, SplitFile, check_row_starts, read_prepared_manifest, split_path
from llamatune.model.loss import IGNORED
from llamatune.seeds import derived_seed
from llamatune.shapes.config import LlamaConfig


@dataclass(frozen=True)
class Batch:
    """Samples one after another in one row, without padding.

    ``input_ids`` and ``labels`` are (1, N) int64; a label is the id at its own position, or -100 (the model predicts
    position t's label from position t-1). ``lengths`` are the samples', ``rows`` their row numbers in the input files.
    """

    input_ids: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    target_tokens: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


class Split:
    """The rows of one file of a prepared directory, memory-mapped."""

    def __init__(self, path: Path) -> None:
        SplitFile(path)  # checks the header
        with safe_open(path, framework="pt") as file:
            offsets, rows, self._ids, self._mask = (file.get_tensor(name) for name in COLUMNS)
        self._starts, self._rows = offsets.tolist(), rows.tolist()
        check_row_starts(self._starts, len(self._ids), path)
        before = torch.cat((torch.zeros(1, dtype=torch.int64), self._mask.cumsum(0)))
        self.target_counts: list[int] = before[offsets].diff().tolist()
        if self.target_counts and min(self.target_counts) == 0:
            raise DataError("a row has no target token", path, "prepare the data again")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def largest_id(self) -> int:
        return int(self._ids.max()) if len(self._ids) else -1

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
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


def check_rows(split: Split, config: LlamaConfig, where: str, on_event: OnEvent) -> None:
    """Raise ``CheckpointError`` for an id beyond the model's embedding; warn of rows beyond its context."""
    if split.largest_id >= config.vocab_size:
        raise CheckpointError(
            f"tokenizer id {split.largest_id} >= {config.vocab_size} embedding rows",
            where,
            "prepare the data with the tokenizer of this model",
        )
    longest, known = max(split.lengths, default=0), config.max_position_embeddings
    if longest > known:
        on_event(Notice(f"{where}: a row of {longest} tokens is longer than the {known} the model knows", "warning"))


def check_tokenizer(prepared: Prepared, model: Path, force_base: bool, on_event: OnEvent) -> None:
    """Raise ``CheckpointError`` if the rows were encoded with another tokenizer than the model directory's."""
    if not (model / "tokenizer.model").is_file():
        on_event(Notice(f"{model} has no tokenizer.model to compare the data's tokenizer with", "warning"))
        return
    own, used = load_tokenizer(model).fingerprint, prepared.manifest.tokenizer_fingerprint
    if own != used:
        if not force_base:
            raise CheckpointError(
                "the data was prepared with another tokenizer than the model's",
                model / "tokenizer.model",
                "prepare it again with this one, or pass --force-base",
            )
        on_event(Notice("the data's ids are another tokenizer's than the model's, as --force-base asks", "warning"))


def epoch_order(rows: int, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """The order in which epoch ``epoch`` (from 0) visits the rows: a permutation of (seed, epoch), or the file's."""
    if not shuffle:
        return list(range(rows))
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    return torch.randperm(rows, generator=generator).tolist()
