"""The first rows of a prepared directory as a person can check them: every token, and whether it is trained."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llamatune.data.tokenizer import Tokenizer
from llamatune.errors import DataError
from llamatune.formats.safetensors import TensorEntry, read_header
from llamatune.safe_reading import open_regular


@dataclass(frozen=True)
class PreviewToken:
    """One token: its id, how the vocabulary spells it, and whether it is a target of training."""

    id: int
    piece: str
    trained: bool


@dataclass(frozen=True)
class PreviewRow:
    """One prepared row; ``row`` is its number in the input files, counted from 1."""

    row: int
    tokens: tuple[PreviewToken, ...]


def preview_rows(directory: Path, tokenizer: Tokenizer, count: int) -> list[PreviewRow]:
    """The first ``count`` training rows, read back from what was written to ``directory``."""
    path = directory / "train.safetensors"
    entries, _ = read_header(path, DataError)
    with open_regular(path, DataError) as file:
        shown = min(count, entries["source_rows"].shape[0])
        offsets = _read(file, entries["offsets"], "q", 0, shown + 1)
        numbers = _read(file, entries["source_rows"], "q", 0, shown)
        rows = []
        for index in range(shown):
            begin, end = offsets[index], offsets[index + 1]
            ids = _read(file, entries["input_ids"], "i", begin, end)
            mask = _read(file, entries["loss_mask"], "B", begin, end)
            tokens = (PreviewToken(i, tokenizer.piece(i), bool(trained)) for i, trained in zip(ids, mask, strict=True))
            rows.append(PreviewRow(numbers[index], tuple(tokens)))
    return rows


def _read(file: BinaryIO, entry: TensorEntry, typecode: str, begin: int, end: int) -> array[int]:
    made: array[int] = array(typecode)
    file.seek(entry.begin + begin * made.itemsize)
    made.frombytes(file.read((end - begin) * made.itemsize))
    return made
