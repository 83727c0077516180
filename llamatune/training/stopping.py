"""When a run stops before its end: a signal asks for it, or the next work would not end in time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llamatune.errors import Stopped
from llamatune.events import ShouldStop, never_stop
from llamatune.ranks import Ranks
from llamatune.training.time_limit import Durations, TimeLimit

FINISHING_S = 15.0
"""How long a window may go on after a signal. Slurm kills after 30 s, and saving takes a while too."""


@dataclass
class Stopping:
    """Answers at each place where a run can stop. Several ranks agree: one that says yes stops all.

    Time is watched on the first rank alone; the others have a limit without an end. ``unsaved``: whether updates were
    made since the last checkpoint. What nothing depends on is always begun: a first window of a process is.
    """

    asked: ShouldStop = never_stop
    limit: TimeLimit = field(default_factory=TimeLimit)
    unsaved: bool = False
    _was_asked: bool = False
    _window_began: float = 0.0
    _batch_began: float = 0.0
    _batches: Durations = field(default_factory=Durations)

    def by_signal(self) -> bool:
        """Whether a signal asked for it, now or before."""
        self._was_asked = self._was_asked or self.asked()
        return self._was_asked

    def stopped(self, where: str, run: Path, without_a_step: bool, ranks: Ranks) -> Stopped:
        """The end of this start of a run, after ``where``: all ranks say the same."""
        end, todo = self.limit.next_end, "run the same command again to continue"
        why = ranks.from_first(None if end is None else f"{max(0.0, end.left_s()):.0f} s before {end.what}")
        if ranks.any(self._was_asked) or why is None:
            return Stopped(f"stopped by a signal after {where}", run, todo)
        todo += ", with more time: there was none for a step" if without_a_step else ""
        return Stopped(f"stopped {why} after {where}", run, todo)

    # Between windows

    def before_window(self) -> bool:
        """Whether no other window should be begun."""
        return self.by_signal() or not self._has(self.limit.steps.at_most)

    def before_evaluation(self) -> bool:
        """Whether no evaluation should be begun. It can be broken off, so its usual time counts."""
        return self.by_signal() or not self._has(self.limit.evaluations.typical + self._save_s)

    def before_result(self) -> bool:
        """Whether there is no time to write the result, which takes as long as a checkpoint at most."""
        return not self._has(0.0)

    # Inside of work

    def begin_window(self) -> None:
        self._window_began = self.limit.clock.monotonic()

    def in_window(self, left_s: float) -> bool:
        """Whether a window that would take ``left_s`` more is given up."""
        if self.by_signal():
            return left_s > FINISHING_S
        return not self._has(left_s)

    def after_passes(self) -> bool:
        """As ``before_window``, at the end of a rank's own passes of a window: others may still compute theirs."""
        step_s = self.limit.steps.at_most
        rest_s = max(0.0, step_s - (self.limit.clock.monotonic() - self._window_began))
        return self.by_signal() or not self.limit.has(rest_s + step_s + self.limit.save_s)

    def in_wait(self) -> bool:
        """Whether to go on no longer with what is not saved: a wait, or the search for a learning rate."""
        return self.by_signal() or not self._has(0.0)

    def begin_evaluation(self) -> None:
        self._batches, self._batch_began = Durations(), self.limit.clock.monotonic()

    def in_evaluation(self) -> bool:
        """Whether an evaluation is broken off before its next batch.

        What it writes, ``best/``, takes as long as a checkpoint at most.
        """
        now = self.limit.clock.monotonic()
        self._batches.add(now - self._batch_began)
        self._batch_began = now
        return self.by_signal() or not self._has(self._batches.at_most + self._save_s)

    # How much time there has to be

    @property
    def _save_s(self) -> float:
        """Of a checkpoint, where there is or will be something to save; a first one may take whatever it takes."""
        return self.limit.save_s if self.unsaved or self.limit.saves.known else 0.0

    def _has(self, seconds: float) -> bool:
        return self.limit.has(seconds + self._save_s)
