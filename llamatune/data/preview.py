"""Preview of a prepared directory: the tokens of its first rows, and which of them are trained."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

from llamatune.formats.prepared import SplitFile, split_path
from llamatune.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class PreviewToken:
    """One token: its id, its piece of the vocabulary, and whether it is a target."""

    id: int
    piece: str
    trained: bool


@dataclass(frozen=True)
class PreviewRow:
    """One prepared row; ``row`` is its number in the input files, counted from 1."""

    row: int
    tokens: list[PreviewToken]


def preview_rows(directory: Path, tokenizer: Tokenizer, count: int) -> list[PreviewRow]:
    """The first ``count`` training rows, read back from what was written to ``directory``."""
    split = SplitFile(split_path(directory, "train"))
    shown = min(count, len(split))
    offsets, numbers = split.column("offsets", 0, shown + 1), split.column("source_rows", 0, shown)
    rows = []
    for number, (begin, end) in zip(numbers, itertools.pairwise(offsets), strict=True):
        ids, mask = split.column("input_ids", begin, end), split.column("loss_mask", begin, end)
        tokens = [PreviewToken(i, tokenizer.piece(i), bool(trained)) for i, trained in zip(ids, mask, strict=True)]
        rows.append(PreviewRow(number, tokens))
    return rows
