"""Spool of encoded rows: tokens in a temporary file, a few numbers a row in memory, until the splits are written."""

from __future__ import annotations

import itertools
import operator
from array import array
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path

from llamatune.data.encoding import EncodedBatch
from llamatune.formats.manifest import Staging
from llamatune.formats.prepared import write_split

_PORTION = 1 << 20


class Spool:
    """Kept rows in file order: 32 bytes a row in memory and 8 for each answer, tokens in the file ``path``.

    A row that was split has an entry for each window; these follow each other and have one row number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lengths, self.span_counts, self.targets = array("i"), array("i"), array("i")
        self.keys, self.loose_keys, self.rows = array("Q"), array("Q"), array("q")
        self._file_starts = list[int]()
        self._file = path.open("xb")

    def __len__(self) -> int:
        return len(self.rows)

    def begin_file(self) -> None:
        """What is added from here on is of the next file."""
        self._file_starts.append(len(self))

    def file_spans(self) -> list[tuple[int, int]]:
        """(first, last + 1) of each file's entries."""
        return list(itertools.pairwise([*self._file_starts, len(self)]))

    def digests(self, copies: Sequence[int] | None = None, loose: bool = False) -> Iterator[int]:
        """A digest of each row, those without ``copies`` left out; a split row has one."""
        keys, before = self.loose_keys if loose else self.keys, itertools.chain((0,), self.rows)
        wanted = map(operator.ne, self.rows, before)
        if copies is not None:
            wanted = map(operator.and_, wanted, map(bool, copies))
        return itertools.compress(keys, wanted)

    def add(self, batch: EncodedBatch, first_row: int) -> None:
        """Append the kept rows of ``batch``, whose first row has the number ``first_row``."""
        self.lengths.extend(batch.lengths)
        self.span_counts.extend(batch.span_counts)
        self.targets.extend(batch.targets)
        self.keys.extend(batch.keys)
        self.loose_keys.extend(batch.loose_keys)
        self.rows.extend(array("q", (first_row + position for position in batch.positions)))
        self._file.write(memoryview(batch.ids).cast("B"))

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def write_split(
        self, staging: Staging, split: str, copies: Sequence[int], check_stop: Callable[[], None]
    ) -> dict[str, int]:
        """Write each row ``copies`` times as one split of a prepared directory, and count what was written.

        Every row that is written comes once before any comes again.
        """
        self._file.flush()
        lengths, rows, trained = array("i"), array("q"), 0
        for wanted in _passes(copies):
            lengths.extend(itertools.compress(self.lengths, wanted))
            rows.extend(itertools.compress(self.rows, wanted))

        def masks() -> Iterator[bytes]:
            nonlocal trained
            for wanted in _passes(copies):
                for mask in self._masks(wanted, check_stop):
                    trained += mask.count(1)
                    yield mask

        tokens = (portion for wanted in _passes(copies) for portion in self._tokens(wanted, check_stop))
        write_split(staging, split, lengths, rows, tokens, masks())
        return {
            "rows": len(rows),
            "tokens": sum(lengths),
            "target_tokens": trained,
            "longest_row_tokens": max(lengths, default=0),
        }

    def _tokens(self, wanted: Sequence[int], check_stop: Callable[[], None]) -> Iterator[bytes]:
        """The wanted rows' tokens, a portion at a time."""
        with self.path.open("rb") as source:
            for take, run in itertools.groupby(zip(wanted, self.lengths, strict=True), key=itemgetter(0)):
                left = 4 * sum(length for _, length in run)
                if not take:
                    source.seek(left, 1)
                    continue
                while left:
                    check_stop()
                    portion = source.read(min(left, _PORTION))
                    assert portion, "the spool is shorter than its rows"
                    yield portion
                    left -= len(portion)

    def _masks(self, wanted: Sequence[int], check_stop: Callable[[], None]) -> Iterator[bytes]:
        """The wanted rows' loss masks."""
        begin = 0
        for number, (take, length, count) in enumerate(zip(wanted, self.lengths, self.span_counts, strict=True)):
            if number % 4096 == 0:
                check_stop()
            end = begin + 2 * count
            if take:
                parts, at = list[bytes](), 0
                for place in range(begin, end, 2):
                    first, last = self.targets[place], self.targets[place + 1]
                    parts += bytes(first - at), b"\1" * (last - first)
                    at = last
                yield b"".join((*parts, bytes(length - at)))
            begin = end


def _passes(copies: Sequence[int]) -> Iterator[Sequence[int]]:
    """For each time that rows are written, 1 or 0 for each row."""
    most = max(copies, default=0)
    if most <= 1:
        yield copies
        return
    for number in range(most):
        yield bytes(count > number for count in copies)
