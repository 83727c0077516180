"""Division of encoded rows into the splits that are written: weights, held-out rows, duplicates, rows in both."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llamatune.data.prepare_report import Counts
from llamatune.data.resolve_options import Plan, Source
from llamatune.data.row_digests import count_distinct, count_shared
from llamatune.data.row_weights import copies_of
from llamatune.data.spool import Spool
from llamatune.data.validation_split import held_out_rows


class Part(NamedTuple):
    """The rows of one split: how often each of a spool is written."""

    spool: Spool
    copies: Sequence[int]


def divide(
    train: Spool, validation: Spool | None, plan: Plan, counts: Counts, warn: Callable[[str], None]
) -> dict[str, Part]:
    """The parts by split; what is equal within and between them is counted in ``counts`` and warned of.

    A row that a weight leaves out is in no part. Rows are held out before others are repeated.
    """
    fraction, seed = plan.options.validation_fraction, plan.options.seed
    copies = _weighted(train, plan.train, seed)
    parts = {"train": Part(train, copies)}
    if validation is not None:
        parts["validation"] = Part(validation, b"\1" * len(validation))
    elif fraction:
        present = bytes(map(bool, copies))
        held = iter(held_out_rows(array("Q", itertools.compress(train.keys, present)), fraction, seed))
        held_out = bytes(next(held) if kept else 0 for kept in present)
        if any(held_out):
            rest = array("H", (0 if out else count for count, out in zip(copies, held_out, strict=True)))
            parts = {"train": Part(train, rest), "validation": Part(train, held_out)}
        else:
            warn("all rows are equal, so none was held out for validation")
    for spool in (train, validation):
        if spool is not None:
            rows = sum(1 for _ in spool.digests())
            counts.duplicates += rows - count_distinct(spool.digests())
            counts.loose_duplicates += rows - count_distinct(spool.digests(loose=True))
    if "validation" in parts:
        _compare(parts["validation"], parts["train"], counts, warn)
    return parts


def _compare(held: Part, train: Part, counts: Counts, warn: Callable[[str], None]) -> None:
    exact, near = (
        count_shared(held.spool.digests(held.copies, loose), train.spool.digests(train.copies, loose))
        for loose in (False, True)
    )
    counts.validation_rows_in_train, counts.validation_rows_near_train = exact, near
    if exact:
        warn(f"{exact:,} validation rows are training rows too")
    if near > exact:
        warn(f"{near - exact:,} validation rows differ from training rows in white space and case alone")


def _weighted(train: Spool, sources: Sequence[Source], seed: int) -> Sequence[int]:
    """How often each row is written; no more than once if no file has a weight."""
    if all(source.weight == 1 for source in sources):
        return b"\1" * len(train)
    copies = array("H")
    for number, (source, (begin, end)) in enumerate(zip(sources, train.file_spans(), strict=True)):
        copies += copies_of(train.rows[begin:end], source.weight, seed, number)
    return copies
