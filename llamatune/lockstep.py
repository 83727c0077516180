"""Threads that take turns, in lockstep: one job runs at a time, and some work is done for all of them at once.

A job runs until it has a request, or waits for the others; then the next one runs, in their order. So what a job
computes does not depend on when threads are switched. Requests wait until no job can run, and are then answered
together with those that are alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Generic, TypeVar

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
Answers = Callable[[list[Any]], list[Any]]


class _State(Enum):
    READY = auto()
    ASKING = auto()
    """It has a request."""
    ANSWERING = auto()
    """It is to answer the requests of several."""
    WAITING = auto()
    """For all others to wait, too."""
    DONE = auto()


class _Abandoned(BaseException):
    """Another job failed in a way that no caller expects."""


@dataclass(eq=False)
class _Job:
    state: _State = _State.READY
    turn: threading.Lock = field(default_factory=threading.Lock)
    place: int = 0
    key: Hashable = None
    request: Any = None
    answer: Any = None
    fault: BaseException | None = None
    outcome: Any = None
    group: list[_Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.turn.acquire()


class Lockstep(Generic[T, E]):
    """Runs jobs in turns.

    ``keep`` and ``restore`` carry what threads share and each job needs for itself, as the state of a generator, over
    the turns of the others.
    """

    def __init__(self, keep: Callable[[], Any] = lambda: None, restore: Callable[[Any], None] = lambda kept: None):
        self._keep, self._restore = keep, restore
        self._jobs: list[_Job] = []
        self._running: _Job | None = None
        self._fault: BaseException | None = None
        self._ended = threading.Event()

    def run(self, jobs: Sequence[Callable[[], T]], expected: type[E]) -> list[T | E]:
        """What each job returned, or the ``expected`` exception it raised; any other ends all jobs and is raised."""
        self._jobs = [_Job() for _ in jobs]
        self._fault = None
        self._ended.clear()
        threads = [
            threading.Thread(target=self._run_one, args=(job, call, expected), daemon=True)
            for job, call in zip(self._jobs, jobs, strict=True)
        ]
        for thread in threads:
            thread.start()
        if threads:
            self._next(None)
            try:
                self._ended.wait()
            except BaseException as fault:  # as of a signal: the jobs end at their next turn
                self._fault = fault
                self._ended.wait()
        for thread in threads:
            thread.join()
        if self._fault is not None:
            raise self._fault
        return [job.outcome for job in self._jobs]

    def ask(self, key: Hashable, place: int, request: Any, answers: Answers) -> Any:
        """The answer to a request of the running job; ``answers`` gives those to several with the same key, in order.

        Where jobs ask with several keys, those of the lowest ``place`` are answered first: who is behind catches up.
        """
        job = self._running
        assert job is not None
        if self._alone(job):
            return answers([request])[0]
        job.state, job.key, job.place, job.request = _State.ASKING, key, place, request
        self._give_turn(job)
        if job.state is _State.ANSWERING:
            self._answer(job, answers)
        answer, fault = job.answer, job.fault
        job.request = job.answer = job.fault = None
        if fault is not None:
            raise fault
        return answer

    def wait(self) -> None:
        """Go on when every other job that is left has come here, too."""
        job = self._running
        assert job is not None
        if not self._alone(job):
            job.state = _State.WAITING
            self._give_turn(job)

    def _alone(self, job: _Job) -> bool:
        return all(other is job or other.state is _State.DONE for other in self._jobs)

    def _answer(self, job: _Job, answers: Answers) -> None:
        group, job.group = job.group, []
        try:
            for one, answer in zip(group, answers([one.request for one in group]), strict=True):
                one.answer = answer
        except Exception as fault:  # of all of them
            for one in group:
                one.fault = fault
        for one in group:
            one.state = _State.READY

    def _give_turn(self, job: _Job) -> None:
        """Let the others run until it is this job's turn again."""
        kept = self._keep()
        self._next(job)
        job.turn.acquire()
        self._running = job
        if self._fault is not None:
            raise _Abandoned
        self._restore(kept)

    def _next(self, job: _Job | None) -> None:
        """Wake the job that runs now: the next one that can, else the first of those whose requests are answered."""
        start = 0 if job is None else self._jobs.index(job) + 1
        in_order = [*self._jobs[start:], *self._jobs[:start]]
        if self._fault is not None:
            chosen = next((one for one in in_order if one.state is not _State.DONE), None)
        else:
            chosen = next((one for one in in_order if one.state is _State.READY), None) or self._first_asking()
        if chosen is None:
            waiting = [one for one in self._jobs if one.state is _State.WAITING]
            for one in waiting:
                one.state = _State.READY
            chosen = waiting[0] if waiting else None
        if chosen is None:
            self._ended.set()
        else:
            chosen.turn.release()

    def _first_asking(self) -> _Job | None:
        asking = [one for one in self._jobs if one.state is _State.ASKING]
        if not asking:
            return None
        first = min(asking, key=lambda one: one.place)
        first.group = [one for one in asking if one.key == first.key]
        first.state = _State.ANSWERING
        return first

    def _run_one(self, job: _Job, call: Callable[[], T], expected: type[E]) -> None:
        job.turn.acquire()
        self._running = job
        try:
            if self._fault is None:
                job.outcome = call()
        except expected as fault:
            job.outcome = fault
        except _Abandoned:
            pass
        except BaseException as fault:
            self._fault = self._fault or fault
        job.state = _State.DONE
        self._next(job)
