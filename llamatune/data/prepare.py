"""``prepare-data``: rows to a prepared directory, by reading, encoding, splitting and writing.

A prepared directory contains its splits (``formats.prepared``), ``refused.jsonl`` if rows were refused, and a manifest,
whose ``facts`` are the settings and the counts of truncated, dropped and refused rows.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.encoding import Recipe
from llamatune.data.prepare_report import (
    Counts,
    bad_rows_error,
    no_rows_error,
    overlong_error,
    report_of,
    row_content,
    row_facts,
    shown_path,
)
from llamatune.data.resolve_options import check_options, input_files, resolve_options, train_on
from llamatune.data.row_files import RawRow, read_raw_rows
from llamatune.data.row_sources import pipes_kept, source_bytes, source_state
from llamatune.data.spool import Spool
from llamatune.data.validation_split import held_out_rows
from llamatune.data.workers import default_workers, encode_batches
from llamatune.durable_writing import refuse_occupied
from llamatune.errors import DataError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.formats.manifest import END_OF_TURN, Staging, build_directory, finished_product, has_manifest
from llamatune.formats.prepared import KIND

_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 19
_PROGRESS_EVERY_S = 0.5


def prepare_data(
    options: PrepareOptions,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    *,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write a prepared directory of ``options.rows``. Its bytes do not depend on ``workers`` (default: by file size).

    A finished output of the same inputs is left unchanged, and its report (``report_of``) is returned.

    Raises:
        SpecError: options that contradict each other or the rows' format.
        DataError: bad rows beyond ``skip_bad_rows``, or no usable row.
        CheckpointError: the tokenizer cannot be used.
        EnvironmentFault: the output directory is not empty or cannot be written.
        Stopped: ``should_stop`` returned true; no file is left.
    """
    check_options(options)
    if not has_manifest(options.output):
        refuse_occupied(options.output, options.overwrite)

    def check_stop() -> None:
        if should_stop():
            raise Stopped("stopped before the rows were read", None, "run the same command again")

    with pipes_kept(input_files(options), check_stop):
        return _prepare(options, on_event, should_stop, workers)


def _prepare(
    options: PrepareOptions, on_event: OnEvent, should_stop: ShouldStop, workers: int | None
) -> dict[str, Any]:
    state = [source_state(path) for path in input_files(options)]
    recipe, inputs = resolve_options(options, on_event)
    if not options.overwrite and (manifest := finished_product(options.output, KIND, inputs)):
        with contextlib.suppress(KeyError):  # an earlier version wrote fewer facts
            report = report_of(options.output, manifest.facts, unchanged=True)
            if report["refused"] <= options.skip_bad_rows:
                return report
    with build_directory(options.output, KIND, inputs, options.overwrite) as staging:
        total_bytes = sum(source_bytes(path) for path in input_files(options))
        if workers is None:
            workers = default_workers(total_bytes)
        _Job(recipe, staging, on_event, should_stop, workers, total_bytes).run()
        if [source_state(path) for path in input_files(options)] != state:
            raise DataError("a row file was changed while it was read", None, "run the same command again")
    return report_of(options.output, staging.facts, unchanged=False)


@dataclass
class _Job:
    """One preparation: from reading the first row to the files in the staging directory."""

    recipe: Recipe
    staging: Staging
    on_event: OnEvent
    should_stop: ShouldStop
    workers: int
    total_bytes: int
    done_bytes: int = 0
    reported_at: float = field(default_factory=time.monotonic)
    counts: Counts = field(default_factory=Counts)
    first_refused: str = ""

    def run(self) -> None:
        options, path = self.recipe.options, self.staging.path
        with contextlib.ExitStack() as stack:
            refused = stack.enter_context((path / "refused.jsonl").open("x", encoding="utf-8"))
            train = stack.enter_context(contextlib.closing(Spool(path / "train.spool")))
            self._encode(options.rows, options.limit, train, refused.write)
            validation = None
            if options.validation:
                validation = stack.enter_context(contextlib.closing(Spool(path / "validation.spool")))
                self._encode(options.validation, None, validation, refused.write)
            counts = self.counts
            if counts.refused > options.skip_bad_rows:
                raise bad_rows_error(counts, self.first_refused)
            for spool, files in ((train, options.rows), (validation, options.validation)):
                if spool is not None and not len(spool):
                    raise no_rows_error(counts, files)
            if counts.prompts_not_prefix:
                why = "" if self.recipe.tokenizer.splits else ": this tokenizer changes white space within a text"
                self._warn(
                    f"{counts.prompts_not_prefix:,} of {counts.kept:,} rows begin with other tokens than their prompt "
                    f"encoded alone, so generate will not continue it as trained{why}"
                )
            if counts.only_last:
                self._warn(
                    f"{counts.only_last:,} of {counts.kept:,} chats train their last answer alone, since the template "
                    "writes earlier answers in another way than the last one"
                )
            splits = self._write(train, validation)
        if not counts.refused:
            (path / "refused.jsonl").unlink()
        self.staging.facts.update(self._facts(splits))

    def _encode(self, files: Sequence[Path], limit: int | None, spool: Spool, refuse: Callable[[str], object]) -> None:
        """Read, encode, count and spool the rows of ``files``; ``refuse`` writes a line of ``refused.jsonl``."""
        options = self.recipe.options
        batches, read = itertools.tee(_batches(files, limit, self._note))
        encoded = encode_batches(self.recipe, (rows for _, _, rows in read), self.workers, self._check_stop)
        with contextlib.closing(encoded):
            for batch, (path, first_row, rows) in zip(encoded, batches, strict=True):
                self.counts.add(batch, path, rows)
                for position, _, message in batch.refused:
                    self.first_refused = self.first_refused or f"{rows[position].place(shown_path(path))}: {message}"
                    if self.counts.refused <= options.skip_bad_rows:  # else nothing is kept, and it may be every row
                        line = {**row_facts(rows[position], path), "reason": message, **row_content(rows[position])}
                        refuse(json.dumps(line, ensure_ascii=True) + "\n")
                overlong = next((position for position, reason in batch.dropped if reason == "overlong"), None)
                if options.overlong == "error" and overlong is not None:
                    raise overlong_error(batch, overlong, path, rows[overlong], options.max_seq_length)
                spool.add(batch, first_row)
                self.done_bytes += sum(len(row.data) for row in rows)
                now = time.monotonic()
                if now - self.reported_at >= _PROGRESS_EVERY_S:
                    self.reported_at, done = now, min(self.done_bytes, self.total_bytes)
                    self.on_event(Progress("bytes of rows encoded", done, self.total_bytes))

    def _write(self, train: Spool, validation: Spool | None) -> dict[str, dict[str, int]]:
        fraction, seed = self.recipe.options.validation_fraction, self.recipe.options.seed
        train_keys = set(train.keys)
        self.counts.duplicates = len(train) - len(train_keys)
        parts: dict[str, tuple[Spool, Sequence[int]]] = {"train": (train, b"\1" * len(train))}
        if validation is not None:
            both = sum(key in train_keys for key in validation.keys)
            self.counts.duplicates += len(validation) - len(set(validation.keys))
            self.counts.validation_rows_in_train = both
            if both:
                self._warn(f"{both} validation rows are training rows too")
            parts["validation"] = validation, b"\1" * len(validation)
        elif fraction:
            held_out = held_out_rows(train.keys, fraction, seed)
            if any(held_out):
                parts = {"train": (train, bytes(1 - held for held in held_out)), "validation": (train, held_out)}
            else:
                self._warn("all rows are equal, so none was held out for validation")
        return {
            split: spool.write_split(self.staging, split, wanted, self._check_stop)
            for split, (spool, wanted) in parts.items()
        }

    def _check_stop(self) -> None:
        if self.should_stop():
            raise Stopped("stopped before the rows were prepared", None, "run the same command again")

    def _note(self, path: Path, message: str) -> None:
        self.on_event(Notice(f"{shown_path(path)}: {message}"))

    def _warn(self, message: str) -> None:
        self.on_event(Notice(message, "warning"))

    def _facts(self, splits: dict[str, dict[str, int]]) -> dict[str, Any]:
        options, recipe, tokenizer = self.recipe.options, self.recipe, self.recipe.tokenizer
        return {
            "format": recipe.format,
            "template": recipe.template.to_dict(),
            END_OF_TURN: None if recipe.chats is None else recipe.chats.stop_id,
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "bos_id": tokenizer.bos_id,
                "eos_id": tokenizer.eos_id,
            },
            "max_seq_length": options.max_seq_length,
            "overlong": options.overlong,
            "train_on_prompt": options.train_on_prompt,
            "train_on": train_on(recipe),
            "row_files": list(map(shown_path, options.rows)),
            "validation_files": list(map(shown_path, options.validation)),
            **self.counts.facts(),
            "train_rows": splits["train"]["rows"],
            "validation_rows": splits.get("validation", {"rows": 0})["rows"],
            "tokens": sum(split["tokens"] for split in splits.values()),
            "target_tokens": sum(split["target_tokens"] for split in splits.values()),
            "splits": splits,
        }


def _batches(
    files: Sequence[Path], limit: int | None, note: Callable[[Path, str], None]
) -> Iterator[tuple[Path, int, list[RawRow]]]:
    """Batches of rows, each of one file, with the file and the number of the batch's first row, counted from 1."""
    number = 1
    for path in files:
        rows, row_bytes = list[RawRow](), 0
        for raw in read_raw_rows(path, partial(note, path)):
            if limit is not None and number + len(rows) > limit:
                break
            rows.append(raw)
            row_bytes += len(raw.data)
            if len(rows) == _BATCH_ROWS or row_bytes >= _BATCH_BYTES:
                yield path, number, rows
                number += len(rows)
                rows, row_bytes = [], 0
        if rows:
            yield path, number, rows
            number += len(rows)
