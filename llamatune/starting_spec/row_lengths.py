"""Lengths of training rows: of a prepared directory, or measured on a file of rows with the model's tokenizer."""

from __future__ import annotations

import shlex
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from llamatune.command_options.preparation import PrepareOptions
from llamatune.command_options.starting_spec import MEASURED_ROWS
from llamatune.data.prepare import prepare_data
from llamatune.errors import DataError, printable
from llamatune.events import Notice, OnEvent, ShouldStop
from llamatune.formats.manifest import has_manifest
from llamatune.formats.prepared import read_lengths, split_path
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.tokenizers.loading import tokenizer_file

ASSUMED_TOKENS = 512
_ROUND = 64


@dataclass(frozen=True)
class RowLengths:
    """Tokens and target tokens of each training row.

    Args:
        directory: of prepared rows; those of a file are still to be written there.
        max_seq_length: to prepare a file with; None: the rows are prepared.
        source: how the lengths are known.
        cut: how many of the rows are longer.
        measured: false: they are assumed.
    """

    lengths: tuple[int, ...]
    targets: tuple[int, ...]
    directory: Path
    source: str
    max_seq_length: int | None = None
    has_validation: bool = False
    cut: int = 0
    measured: bool = True

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def shorter(self, tokens: int) -> RowLengths:
        """The same rows, truncated."""
        lengths = tuple(min(length, tokens) for length in self.lengths)
        targets = tuple(min(count, tokens) for count in self.targets)
        cut = sum(length > tokens for length in self.lengths)
        return replace(self, lengths=lengths, targets=targets, max_seq_length=tokens, cut=cut)

    def told(self) -> str:
        """Number, median, 95th percentile and longest."""
        if not self.measured:
            return f"Rows of {self.longest:,} tokens, all of them targets, are assumed: {self.source}"
        ordered = sorted(self.lengths)
        places = (len(ordered) // 2, len(ordered) * 95 // 100, len(ordered) - 1)
        middle, most, longest = (ordered[place] for place in places)
        return (
            f"{len(ordered):,} training rows ({self.source}): {sum(ordered):,} tokens, {sum(self.targets):,} of them "
            f"targets; half have at most {middle:,}, 95 % at most {most:,}, the longest {longest:,}"
        )


def row_lengths(data: Path, model: Path, config: LlamaConfig, on_event: OnEvent, should_stop: ShouldStop) -> RowLengths:
    """The lengths of what ``data`` holds.

    Without a tokenizer beside the model, rows of ``ASSUMED_TOKENS`` are assumed.

    Raises:
        DataError: no row can be used, or one is wrong. CheckpointError: the tokenizer cannot be used.
    """
    if has_manifest(data):
        return _prepared(data, data, "prepared", None)
    if data.is_dir() and split_path(data, "train").exists():
        raise DataError("a prepared directory without its manifest", data, "prepare the data again")
    name, longest = _name_of(data), config.max_position_embeddings
    if not model.is_dir() or tokenizer_file(model) is None:
        tokens = min(ASSUMED_TOKENS, longest)
        on_event(Notice(f"no tokenizer in {model}: planned for rows of {tokens} tokens, all of them targets"))
        rows = (tokens,) * 64
        source = "the model has no tokenizer beside it"
        return RowLengths(rows, rows, Path("prepared") / name, source, tokens, measured=False)
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "prepared"
        request = PrepareOptions(
            rows=[data], tokenizer=model, output=made, max_seq_length=longest, limit=MEASURED_ROWS
        )  # fmt: skip
        report = prepare_data(request, should_stop=should_stop)
        first = "the first " if report["rows_in"] >= MEASURED_ROWS else ""
        source = f"{report['format']} rows, {first}{report['rows_in']:,} measured"
        found = _prepared(made, Path("prepared") / name, source, None)
    rounded = min(longest, -(-found.longest // _ROUND) * _ROUND)
    return replace(found, max_seq_length=rounded, cut=report["truncated"])


def _prepared(read: Path, directory: Path, source: str, tokens: int | None) -> RowLengths:
    lengths, targets = read_lengths(read)
    if not lengths:
        raise DataError("no training row", read, "prepare the data again")
    validation = split_path(read, "validation").exists()
    return RowLengths(tuple(lengths), tuple(targets), directory, source, tokens, validation)


def _name_of(data: Path) -> str:
    """Of a file without its endings, as ``alpaca`` of ``alpaca.jsonl.gz``."""
    return printable(data.name.partition(".")[0]) or "rows"


def preparing(data: Path, model: Path, rows: RowLengths) -> str | None:
    """The command that prepares a file of rows; None: they are prepared."""
    if rows.max_seq_length is None:
        return None
    words = ["llamatune", "prepare-data", str(data), "--tokenizer", str(model), "--output", str(rows.directory)]
    words += ["--max-seq-length", str(rows.max_seq_length), "--validation-fraction", "0.05"]
    return printable(shlex.join(words))
