"""Spool of encoded rows: tokens in a temporary file, a few numbers a row in memory, until the splits are written."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

from llamatune.data.encoding import EncodedBatch
from llamatune.formats.manifest import Staging
from llamatune.formats.prepared import write_split

_PORTION = 1 << 20


class Spool:
    """Kept rows in file order: at most 32 bytes a row in memory, the tokens in the temporary file ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lengths, self.first_targets = array("i"), array("i")
        self.keys, self.rows = array("Q"), array("q")
        self._file = path.open("xb")

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, batch: EncodedBatch, first_row: int) -> None:
        """Append the kept rows of ``batch``, whose first row has the number ``first_row``."""
        self.lengths.extend(batch.lengths)
        self.first_targets.extend(batch.first_targets)
        self.keys.extend(batch.keys)
        self.rows.extend(array("q", (first_row + position for position in batch.positions)))
        self._file.write(memoryview(batch.ids).cast("B"))

    def finish(self) -> None:
        """No more rows will come."""
        self._file.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def write_split(
        self, staging: Staging, split: str, wanted: Callable[[int], bool], check_stop: Callable[[], None]
    ) -> dict[str, int]:
        """Write the rows whose index is ``wanted`` as one split of a prepared directory, and count them."""
        chosen = array("q", (index for index in range(len(self)) if wanted(index)))
        lengths = array("i", (self.lengths[index] for index in chosen))
        write_split(
            staging,
            split,
            lengths,
            array("q", (self.rows[index] for index in chosen)),
            self._tokens(wanted, check_stop),
            self._mask(chosen, check_stop),
        )
        tokens, prompts = sum(lengths), sum(self.first_targets[index] for index in chosen)
        longest = max(lengths, default=0)
        return {
            "rows": len(chosen), "tokens": tokens, "target_tokens": tokens - prompts, "longest_row_tokens": longest,
        }  # fmt: skip

    def _mask(self, chosen: array[int], check_stop: Callable[[], None]) -> Iterator[bytes]:
        for number, index in enumerate(chosen):
            if number % 4096 == 0:
                check_stop()
            first = self.first_targets[index]
            yield bytes(first) + b"\1" * (self.lengths[index] - first)

    def _tokens(self, wanted: Callable[[int], bool], check_stop: Callable[[], None]) -> Iterator[bytes]:
        """The wanted rows' tokens, a portion at a time."""
        with self.path.open("rb") as source:
            for take, run in itertools.groupby(range(len(self)), wanted):
                left = 4 * sum(self.lengths[index] for index in run)
                if not take:
                    source.seek(left, 1)
                    continue
                while left:
                    check_stop()
                    portion = source.read(min(left, _PORTION))
                    assert portion, "the spool is shorter than its rows"
                    yield portion
                    left -= len(portion)
