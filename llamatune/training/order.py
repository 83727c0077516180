"""Which samples each accumulation window trains on: a function of (seed, epoch)."""

from __future__ import annotations

import itertools

from llamatune.data.dataset import Batch, Split
from llamatune.data.packing import epoch_rows
from llamatune.spec import RunSpec
from llamatune.training.schedule import Schedule, packing_budget


class Windows:
    """The micro-batches of every window of a run."""

    def __init__(self, spec: RunSpec, split: Split, schedule: Schedule) -> None:
        self._spec, self._split, self._schedule = spec, split, schedule
        self._order: tuple[int, list[list[int]]] = (-1, [])

    def samples(self, window: int) -> list[list[int]]:
        """The indices of the samples of each micro-batch."""
        epoch, place = divmod(window, self._schedule.windows_per_epoch)
        if self._order[0] != epoch:
            lengths, spec = self._split.lengths, self._spec
            rows = epoch_rows(lengths, spec.training.seed, epoch, spec.data.shuffle, packing_budget(spec))
            self._order = (epoch, rows)
        begin, size = place * self._schedule.rows_per_window, self._spec.training.micro_batch_size
        rows = self._order[1][begin : begin + self._schedule.rows_per_window]
        return [list(itertools.chain(*rows[start : start + size])) for start in range(0, len(rows), size)]

    def micro_batches(self, window: int) -> list[Batch]:
        """What the window's forward passes are given, one after another."""
        return [self._split.batch(indices) for indices in self.samples(window)]
