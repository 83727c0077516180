"""Report of ``prepare-data``: counts of kept, truncated, dropped and refused rows; its errors and warnings."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from llamatune.data.column_maps import PRESETS
from llamatune.data.encoding import EncodedBatch
from llamatune.data.raw_row import RawRow, shown_place
from llamatune.errors import DataError

_LONGEST_SHOWN = 5
_MOST_KEYS = 100


def shown_path(path: Path) -> str:
    """``path`` as valid Unicode; bytes of its name that are no UTF-8 are replaced."""
    return str(path).encode(errors="replace").decode()


def row_facts(row: RawRow, path: Path) -> dict[str, Any]:
    """A row's place as JSON values: ``file``, ``line`` if the file has lines, and ``row``, from 1 in its file."""
    return {"file": shown_path(path), **({} if row.line is None else {"line": row.line}), "row": row.row}


def row_content(row: RawRow) -> dict[str, Any]:
    """What a refused row holds, as text: ``content``. Of a larger row than is read it is only the beginning."""
    return {"content": row.data.decode(errors="backslashreplace")}


@dataclass
class FileCounts:
    """The running totals of one input file. ``weight``: None for validation files."""

    file: str
    format: str
    template: str
    weight: float | None
    rows_in: int = 0
    kept: int = 0
    dropped: int = 0
    refused: int = 0
    train_rows: int = 0
    validation_rows: int = 0


@dataclass
class Counts:
    """The running totals of one preparation; ``rows_in`` is ``kept + dropped + refused``.

    ``duplicates`` and ``validation_rows_in_train`` count equal rows; ``loose_duplicates`` and
    ``validation_rows_near_train`` also those that differ in white space and case alone.
    """

    rows_in: int = 0
    kept: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    split_rows: int = 0
    split_windows: int = 0
    repeated_tokens: int = 0
    moved_spaces: int = 0
    forced_boundaries: int = 0
    prompts_not_prefix: int = 0
    only_last: int = 0
    dropped: int = 0
    dropped_reasons: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    refused_reasons: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    loose_duplicates: int = 0
    validation_rows_in_train: int = 0
    validation_rows_near_train: int = 0
    special_texts: Counter[str] = field(default_factory=Counter)
    first_special_text: dict[str, Any] | None = None
    ignored_keys: Counter[str] = field(default_factory=Counter)
    adjusted: Counter[str] = field(default_factory=Counter)
    longest_rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, batch: EncodedBatch, path: Path, rows: list[RawRow], of_file: FileCounts) -> None:
        """Count one batch of rows of ``path``, also in the totals of its file."""
        for totals in (self, of_file):
            totals.rows_in += len(rows)
            totals.kept += len(rows) - len(batch.dropped) - len(batch.refused)
            totals.dropped += len(batch.dropped)
            totals.refused += len(batch.refused)
        self.truncated += batch.truncated
        self.truncated_tokens += batch.truncated_tokens
        self.split_rows += batch.split_rows
        self.split_windows += batch.split_windows
        self.repeated_tokens += batch.repeated_tokens
        self.special_texts.update(text for _, text in batch.special_texts)
        if batch.special_texts and self.first_special_text is None:
            position, text = batch.special_texts[0]
            self.first_special_text = {"text": text, **row_facts(rows[position], path)}
        self.moved_spaces += batch.moved_spaces
        self.forced_boundaries += batch.forced_boundaries
        self.prompts_not_prefix += batch.prompts_not_prefix
        self.only_last += batch.only_last
        self.dropped_reasons.update(reason for _, reason in batch.dropped)
        self.refused_reasons.update(kind for _, kind, _ in batch.refused)
        self.adjusted.update(batch.adjusted)
        for key, count in batch.ignored_keys.items():
            known = key in self.ignored_keys or len(self.ignored_keys) < _MOST_KEYS
            self.ignored_keys[key if known else "..."] += count
        longest = heapq.nlargest(_LONGEST_SHOWN, batch.full_lengths, key=itemgetter(1))
        self.longest_rows += [{"tokens": tokens, **row_facts(rows[position], path)} for position, tokens in longest]
        self.longest_rows.sort(key=lambda row: -int(row["tokens"]))  # stable: of equal rows the earlier stays first
        del self.longest_rows[_LONGEST_SHOWN:]

    def facts(self) -> dict[str, Any]:
        return {name: dict(sorted(n.items())) if isinstance(n, Counter) else n for name, n in vars(self).items()}


_REPORTED = (
    "rows_in", "kept", "truncated", "truncated_tokens", "dropped", "dropped_reasons", "refused", "refused_reasons",
    "duplicates", "validation_rows_in_train", "ignored_keys", "longest_rows", "train_rows", "validation_rows", "tokens",
    "target_tokens", "splits", "format", "template", "max_seq_length",
)  # fmt: skip

_REPORTED_LATER = (
    "moved_spaces", "forced_boundaries", "prompts_not_prefix", "only_last", "train_on", "files", "split_rows",
    "split_windows", "repeated_tokens", "loose_duplicates", "validation_rows_near_train", "special_texts",
    "first_special_text", "adjusted",
)  # fmt: skip
"""Facts that earlier versions did not write."""


def report_of(output: Path, facts: Mapping[str, Any], unchanged: bool) -> dict[str, Any]:
    """The report in a manifest's facts; ``KeyError`` if one is missing. ``unchanged``: ``output`` was already there.

    ``longest_rows`` are the longest rows before truncation; ``splits`` has the rows, tokens, target tokens and longest
    row of each split as written. ``prompts_not_prefix`` counts the kept rows whose tokens do not begin with those
    of the prompt alone, ``only_last`` the chats of which the template lets only the last answer be trained,
    ``special_texts`` the rows that hold a special token's text, ``adjusted`` the rows that were read though they had
    not the usual form, by kind. What is None was not counted by the earlier version that wrote the directory.
    """
    report = {"output": shown_path(output), "unchanged": unchanged, **{name: facts[name] for name in _REPORTED}}
    return {**report, **{name: facts.get(name) for name in _REPORTED_LATER}}


def warnings_of(counts: Counts, splits: bool) -> list[str]:
    """What the rows have that may spoil a run."""
    found, of = list[str](), f"of {counts.kept:,}"
    if counts.prompts_not_prefix:
        why = "" if splits else ": this tokenizer changes white space within a text"
        found.append(
            f"{counts.prompts_not_prefix:,} {of} rows begin with other tokens than their prompt encoded alone, so "
            f"generate will not continue it as trained{why}"
        )
    if counts.only_last:
        found.append(
            f"{counts.only_last:,} {of} chats train their last answer alone, since the template writes earlier answers "
            "in another way than the last one"
        )
    if first := counts.first_special_text:
        place = shown_place(first["file"], first.get("line"), first.get("row"))
        found.append(
            f"{counts.special_texts.total():,} {of} rows contain a special token's text, the first {first['text']} in "
            f"{place}: it is encoded as plain text; take it out if a template left it there"
        )
    return found


ADJUSTMENTS = {
    "role_alias": "roles by other names",
    "text_parts": "messages in parts, whose texts are put together",
    "json_in_text": "lists or objects as JSON in a text",
    "turns_without_roles": "texts without roles, taken as the user's and the assistant's in turn",
    "turns_joined": "messages of one role in a row, joined by an empty line",
    "trailing_turns": "messages after the assistant's last one, left out",
    "empty_system": "an empty system message, taken as none",
    "leading_assistant": "a message of the assistant before the user's first, not trained",
    "later_system": "a system message after the first turn",
    "tools": "tools, whose turns are not trained",
    "function_call": "a function_call, taken as tool_calls",
    "list_of_one": "a list of one text, taken as the text",
    "no_column": "without the column that --map names for an optional field",
}
"""What rows were read as though they had not the usual form; beside these ``preset_NAME``."""


def adjustments_told(counts: Counts) -> list[str]:
    """A sentence for each kind of adjustment."""
    told = []
    for kind, count in sorted(counts.adjusted.items()):
        preset = PRESETS.get(kind.removeprefix("preset_"))
        what = ADJUSTMENTS[kind] if preset is None else f"columns as --map {preset.name} reads them ({preset.shown})"
        told.append(f"{count:,} of {counts.rows_in - counts.refused:,} rows: {what}")
    return told


def bad_rows_error(counts: Counts, first: str) -> DataError:
    """The error for more unusable rows than ``--skip-bad-rows`` allows; ``first`` is the first one and its fault."""
    total, rows_in = counts.refused, counts.rows_in
    rows, them = ("row", "it") if total == 1 else ("rows", "them")
    todo = f"{total} bad {rows} of {rows_in}; correct {them}, or leave {them} out with --skip-bad-rows {total}"
    return DataError(first, None, todo if counts.kept else f"0 usable rows of {rows_in}")


def no_rows_error(counts: Counts, files: Sequence[Path]) -> DataError:
    """The error for no usable row."""
    reasons = ", ".join(f"{count} {kind}" for kind, count in (counts.dropped_reasons + counts.refused_reasons).items())
    todo = "the files hold no rows" if not counts.rows_in else reasons
    if counts.dropped_reasons["no_target_tokens"]:
        todo += "; the prompts fill --max-seq-length: raise it"
    return DataError(f"0 usable rows of {counts.rows_in}", ", ".join(map(shown_path, files)), todo)


def overlong_error(batch: EncodedBatch, position: int, path: Path, row: RawRow, max_seq_length: int) -> DataError:
    """The error of ``--overlong error`` for its first row that is too long."""
    tokens = dict(batch.full_lengths)[position]
    return DataError(
        f"{row.place(shown_path(path))}: the row has {tokens} tokens, more than --max-seq-length {max_seq_length}",
        None,
        "raise it, or choose --overlong truncate or drop",
    )
