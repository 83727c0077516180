"""The time limit of a run: durations of steps, saves and evaluations, and whether the next ones fit before its end."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llamatune.events import Notice, OnEvent
from llamatune.slurm_job_end import Clock, Countdown, job_end
from llamatune.spec_sections import TrainingSection
from llamatune.units import duration, parse_duration

SAVED_BEFORE_S = 20.0
"""How long before a job's end the run is saved. Slurm ends jobs by its own clock, and the process has to end too."""
_OF_BUDGET = 0.1
"""The share of ``training.max_time`` that is kept at most: nothing ends the process there."""
_KEPT = 64
_HIGH = 0.9
_BYTES_PER_S, _FIRST_SHARE = 100e6, 0.1
"""Before a save was measured, it is taken for as slow as a busy disk, or for so much of the time that there was.

A run that saves too early because of it has measured one then, and goes on.
"""
_ASKED_AHEAD_S = 5.0
_ASKED_EVERY_S = 60.0


class Durations:
    """The last durations of a kind of work, in seconds. The first of a process warms up, and is left out of several."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_KEPT)
        self._count = 0

    def add(self, seconds: float) -> None:
        self._last.append(seconds)
        self._count += 1
        if self._count == 4:
            self._last.popleft()

    @property
    def known(self) -> bool:
        return self._count > 0

    @property
    def typical(self) -> float:
        """The median; 0 where nothing was measured."""
        return sorted(self._last)[len(self._last) // 2] if self._last else 0.0

    @property
    def at_most(self) -> float:
        """What the next one will hardly exceed: the longest, more of it the fewer there are, and the usual spread."""
        ordered = sorted(self._last)
        if not ordered:
            return 0.0
        spread = ordered[int(_HIGH * (len(ordered) - 1))] - ordered[len(ordered) // 2]
        return ordered[-1] * (1 + 2 / len(ordered)) + spread


@dataclass
class TimeLimit:
    """Whether work and the saving that follows it are done before the first of ``ends``, its margin apart.

    ``checkpoint_bytes`` tells how long saving may take before the first was measured.
    """

    ends: Sequence[Countdown] = ()
    checkpoint_bytes: int = 0
    clock: Clock = field(default_factory=Clock)
    steps: Durations = field(default_factory=Durations)
    saves: Durations = field(default_factory=Durations)
    evaluations: Durations = field(default_factory=Durations)
    _asked_at: float = -math.inf

    def __post_init__(self) -> None:
        self._first_save_s = self.checkpoint_bytes / _BYTES_PER_S
        if self.ends:
            self._first_save_s = max(self._first_save_s, _FIRST_SHARE * self._left_s())

    @contextlib.contextmanager
    def measured(self, kind: Durations) -> Iterator[None]:
        """The work of the block is one of its kind; work that was broken off is none."""
        began = self.clock.monotonic()
        yield
        kind.add(self.clock.monotonic() - began)

    @property
    def save_s(self) -> float:
        """The most that a checkpoint will take."""
        return self.saves.at_most if self.saves.known else self._first_save_s

    @property
    def next_end(self) -> Countdown | None:
        """The first end."""
        return min(self.ends, key=lambda end: end.left_s() - end.margin_s, default=None)

    def has(self, seconds: float) -> bool:
        """Whether so much time is left. A job's end is asked for again before that is denied."""
        if not self.ends:
            return True
        if self._left_s() >= seconds + _ASKED_AHEAD_S:
            return True
        if self.clock.monotonic() - self._asked_at > _ASKED_EVERY_S:
            self._asked_at = self.clock.monotonic()
            for end in self.ends:
                end.ask_again()
        return self._left_s() >= seconds

    def _left_s(self) -> float:
        return min(end.left_s() - end.margin_s for end in self.ends)


def time_limit(
    training: TrainingSection, checkpoint_bytes: int, clock: Clock, began_s: float, on_event: OnEvent
) -> TimeLimit:
    """The limits of this start of a run, which began at ``began_s`` of the monotonic clock; notices name them."""
    job = job_end(SAVED_BEFORE_S, clock, on_event)
    ends = [] if job is None else [job]
    if training.max_time is not None:
        budget_s = parse_duration(training.max_time, "training.max_time")
        left_s, margin_s = began_s + budget_s - clock.monotonic(), min(SAVED_BEFORE_S, _OF_BUDGET * budget_s)
        ends.append(Countdown("training.max_time", left_s, margin_s, clock))
    for end in ends:
        left = duration(max(0.0, end.left_s()))
        on_event(Notice(f"{left} until {end.what}: the run stops before, saved"))
    return TimeLimit(ends, checkpoint_bytes, clock)
