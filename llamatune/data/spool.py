"""Encoded rows on their way to disk: tokens in a temporary file, a few numbers a row in memory."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable
from pathlib import Path

from llamatune.data.encoding import EncodedBatch
from llamatune.durable_writing import writing
from llamatune.formats.manifest import Staging
from llamatune.formats.safetensors import TensorWriter, data_bytes

_PORTION = 1 << 20


class Spool:
    """Kept rows in file order; at most 32 bytes a row are held, the tokens lie in ``path`` until the block ends."""

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
        self, staging: Staging, file_name: str, wanted: Callable[[int], bool], check_stop: Callable[[], None]
    ) -> dict[str, int]:
        """Write the rows whose index is ``wanted`` as one split of a prepared directory, and count them.

        The tensors are ``offsets`` I64 (rows + 1) and ``source_rows`` I64 (rows), then ``input_ids`` I32 and
        ``loss_mask`` U8 (1: the token is a target), one after the other: the widest first, so that each is aligned.
        """
        chosen = array("q", (index for index in range(len(self)) if wanted(index)))
        offsets = array("q", itertools.accumulate((self.lengths[index] for index in chosen), initial=0))
        tokens = offsets[-1]
        tensors = [
            ("offsets", "I64", (len(offsets),)),
            ("source_rows", "I64", (len(chosen),)),
            ("input_ids", "I32", (tokens,)),
            ("loss_mask", "U8", (tokens,)),
        ]
        with writing(staging.path / file_name, data_bytes(tensors)) as file:
            writer = TensorWriter(file, tensors)
            writer.write(memoryview(offsets).cast("B"))
            writer.write(memoryview(array("q", (self.rows[index] for index in chosen))).cast("B"))
            self._copy_tokens(writer, wanted, check_stop)
            for number, index in enumerate(chosen):
                if number % 4096 == 0:
                    check_stop()
                first = self.first_targets[index]
                writer.write(bytes(first) + b"\1" * (self.lengths[index] - first))
            staging.digests[file_name] = writer.finish()
        targets = sum(self.lengths[index] - self.first_targets[index] for index in chosen)
        longest = max((self.lengths[index] for index in chosen), default=0)
        return {"rows": len(chosen), "tokens": tokens, "target_tokens": targets, "longest_row_tokens": longest}

    def _copy_tokens(self, writer: TensorWriter, wanted: Callable[[int], bool], check_stop: Callable[[], None]) -> None:
        """Copy the wanted rows' tokens in runs of neighbours, a portion at a time."""
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
                    writer.write(portion)
                    left -= len(portion)
