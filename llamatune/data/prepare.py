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
from llamatune.data.division import divide
from llamatune.data.encoding import EncodedBatch
from llamatune.data.prepare_report import (
    Counts,
    FileCounts,
    adjustments_told,
    bad_rows_error,
    no_rows_error,
    overlong_error,
    report_of,
    row_content,
    row_facts,
    shown_path,
    warnings_of,
)
from llamatune.data.raw_row import RawRow
from llamatune.data.resolve_options import Plan, Source, check_options, input_files, resolve_options, train_on
from llamatune.data.row_files import read_raw_rows
from llamatune.data.row_sources import pipes_kept, source_bytes, source_state
from llamatune.data.spool import Spool
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

    with pipes_kept(input_files(options), should_stop):
        return _prepare(options, on_event, should_stop, workers)


def _prepare(
    options: PrepareOptions, on_event: OnEvent, should_stop: ShouldStop, workers: int | None
) -> dict[str, Any]:
    state = [source_state(path) for path in input_files(options)]
    plan = resolve_options(options, on_event)
    if not options.overwrite and (manifest := finished_product(options.output, KIND, plan.inputs)):
        with contextlib.suppress(KeyError):  # an earlier version wrote fewer facts
            report = report_of(options.output, manifest.facts, unchanged=True)
            if report["refused"] <= options.skip_bad_rows:
                return report
    with build_directory(options.output, KIND, plan.inputs, options.overwrite) as staging:
        total_bytes = sum(source_bytes(path) for path in input_files(options))
        if workers is None:
            workers = default_workers(total_bytes)
        _Job(plan, staging, on_event, should_stop, workers, total_bytes).run()
        if [source_state(path) for path in input_files(options)] != state:
            raise DataError("a row file was changed while it was read", None, "run the same command again")
    return report_of(options.output, staging.facts, unchanged=False)


@dataclass
class _Job:
    """One preparation: from reading the first row to the files in the staging directory."""

    plan: Plan
    staging: Staging
    on_event: OnEvent
    should_stop: ShouldStop
    workers: int
    total_bytes: int
    done_bytes: int = 0
    reported_at: float = field(default_factory=time.monotonic)
    counts: Counts = field(default_factory=Counts)
    files: list[FileCounts] = field(default_factory=list)
    first_refused: str = ""

    def run(self) -> None:
        plan, options, path = self.plan, self.plan.options, self.staging.path
        with contextlib.ExitStack() as stack:
            refused = stack.enter_context((path / "refused.jsonl").open("x", encoding="utf-8"))
            train = stack.enter_context(contextlib.closing(Spool(path / "train.spool")))
            self._encode(plan.train, options.limit, train, refused.write)
            validation = None
            if plan.validation:
                validation = stack.enter_context(contextlib.closing(Spool(path / "validation.spool")))
                self._encode(plan.validation, None, validation, refused.write)
            counts = self.counts
            if counts.refused > options.skip_bad_rows:
                raise bad_rows_error(counts, self.first_refused)
            for spool, sources in ((train, plan.train), (validation, plan.validation)):
                if spool is not None and not len(spool):
                    raise no_rows_error(counts, [source.path for source in sources])
            for told in adjustments_told(counts):
                self.on_event(Notice(told))
            for warning in warnings_of(counts, plan.recipe.tokenizer.splits):
                self._warn(warning)
            splits = self._write(train, validation)
        if not counts.refused:
            (path / "refused.jsonl").unlink()
        self.staging.facts.update(self._facts(splits))

    def _encode(
        self, sources: Sequence[Source], limit: int | None, spool: Spool, refuse: Callable[[str], object]
    ) -> None:
        """Read, encode, count and spool the rows of ``sources``; ``refuse`` writes a line of ``refused.jsonl``."""
        number = 1
        for recipe, alike in itertools.groupby(sources, key=lambda source: source.recipe):
            batches, read = itertools.tee(_batches(list(alike), number, limit, self._note))
            encoded = encode_batches(recipe, (rows for _, _, rows in read if rows), self.workers, self._check_stop)
            with contextlib.closing(encoded):
                for source, first_row, rows in batches:
                    if not rows:
                        self._begin_file(source, spool)
                        continue
                    self._add(next(encoded), source.path, first_row, rows, spool, refuse)
                    number = first_row + len(rows)

    def _begin_file(self, source: Source, spool: Spool) -> None:
        recipe = source.recipe
        weight = source.weight if len(self.files) < len(self.plan.train) else None  # validation files come last
        self.files.append(FileCounts(shown_path(source.path), recipe.format, recipe.template.name, weight))
        spool.begin_file()

    def _add(
        self,
        batch: EncodedBatch,
        path: Path,
        first_row: int,
        rows: list[RawRow],
        spool: Spool,
        refuse: Callable[[str], object],
    ) -> None:
        options = self.plan.options
        self.counts.add(batch, path, rows, self.files[-1])
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
            self.reported_at = now
            part = min(self.done_bytes / self.total_bytes, 1.0) if self.total_bytes else None
            self.on_event(Progress("rows encoded", self.counts.rows_in, part=part))

    def _write(self, train: Spool, validation: Spool | None) -> dict[str, dict[str, int]]:
        plan = self.plan
        parts = divide(train, validation, plan, self.counts, self._warn)
        for split, part in parts.items():
            of_spool = self.files[: len(plan.train)] if part.spool is train else self.files[len(plan.train) :]
            for totals, (begin, end) in zip(of_spool, part.spool.file_spans(), strict=True):
                setattr(totals, f"{split}_rows", sum(part.copies[begin:end]))
        return {
            split: part.spool.write_split(self.staging, split, part.copies, self._check_stop)
            for split, part in parts.items()
        }

    def _check_stop(self) -> None:
        if self.should_stop():
            raise Stopped("stopped before the rows were prepared", None, "run the same command again")

    def _note(self, path: Path, message: str) -> None:
        self.on_event(Notice(f"{shown_path(path)}: {message}"))

    def _warn(self, message: str) -> None:
        self.on_event(Notice(message, "warning"))

    def _facts(self, splits: dict[str, dict[str, int]]) -> dict[str, Any]:
        plan, options, recipe = self.plan, self.plan.options, self.plan.recipe
        tokenizer, of_chats = recipe.tokenizer, [found for found in plan.recipes if found.chats is not None]
        stop_ids = [found.chats.stop_id for found in of_chats if found.chats is not None]
        return {
            "format": ", ".join(found.format for found in plan.recipes),
            "template": recipe.template.to_dict(),
            END_OF_TURN: stop_ids[0] if stop_ids else None,
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "bos_id": tokenizer.bos_id,
                "eos_id": tokenizer.eos_id,
            },
            "max_seq_length": options.max_seq_length,
            "overlong": options.overlong,
            "train_on_prompt": options.train_on_prompt,
            "train_on": train_on(of_chats[0] if of_chats else recipe),
            "row_files": [shown_path(source.path) for source in plan.train],
            "validation_files": list(map(shown_path, options.validation)),
            **self.counts.facts(),
            "files": list(map(vars, self.files)),
            "train_rows": splits["train"]["rows"],
            "validation_rows": splits.get("validation", {"rows": 0})["rows"],
            "tokens": sum(split["tokens"] for split in splits.values()),
            "target_tokens": sum(split["target_tokens"] for split in splits.values()),
            "splits": splits,
        }


def _batches(
    sources: Sequence[Source], number: int, limit: int | None, note: Callable[[Path, str], None]
) -> Iterator[tuple[Source, int, list[RawRow]]]:
    """Batches of rows, each of one file, with the file and the number of the batch's first row, from ``number`` on.

    A batch without rows comes before those of each file.
    """
    for source in sources:
        yield source, number, []
        rows, row_bytes = list[RawRow](), 0
        for raw in read_raw_rows(source.path, partial(note, source.path)):
            if limit is not None and number + len(rows) > limit:
                break
            rows.append(raw)
            row_bytes += len(raw.data)
            if len(rows) == _BATCH_ROWS or row_bytes >= _BATCH_BYTES:
                yield source, number, rows
                number += len(rows)
                rows, row_bytes = [], 0
        if rows:
            yield source, number, rows
            number += len(rows)
