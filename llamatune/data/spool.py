"""Spool of encoded rows: tokens in a temporary file, a few numbers a row in memory, until the splits are written."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path

from llamatune.data.encoding import EncodedBatch
from llamatune.formats.manifest import Staging
from llamatune.formats.prepared import write_split

_PORTION = 1 << 20


class Spool:
    """Kept rows in file order: 24 bytes a row in memory and 8 for each answer, tokens in the file ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lengths, self.span_counts, self.targets = array("i"), array("i"), array("i")
        self.keys, self.rows = array("Q"), array("q")
        self._file = path.open("xb")

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, batch: EncodedBatch, first_row: int) -> None:
        """Append the kept rows of ``batch``, whose first row has the number ``first_row``."""
        self.lengths.extend(batch.lengths)
        self.span_counts.extend(batch.span_counts)
        self.targets.extend(batch.targets)
        self.keys.extend(batch.keys)
        self.rows.extend(array("q", (first_row + position for position in batch.positions)))
        self._file.write(memoryview(batch.ids).cast("B"))

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def write_split(
        self, staging: Staging, split: str, wanted: Sequence[int], check_stop: Callable[[], None]
    ) -> dict[str, int]:
        """Write the rows that are ``wanted``, 1 or 0 for each, as one split of a prepared directory, and count them."""
        self._file.flush()
        lengths = array("i", itertools.compress(self.lengths, wanted))
        rows = array("q", itertools.compress(self.rows, wanted))
        trained = 0

        def masks() -> Iterator[bytes]:
            nonlocal trained
            for mask in self._masks(wanted, check_stop):
                trained += mask.count(1)
                yield mask

        write_split(staging, split, lengths, rows, self._tokens(wanted, check_stop), masks())
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
