"""The events of several runs that are trained at once, as progress of all and lines that name the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from llamatune.events import EpochDone, EvalDone, Event, Notice, OnEvent, Progress, RunStarted, StepDone, StepSkipped
from llamatune.sweeping.members import Member


class Several:
    """Reports to one observer what happens in several runs.

    Updates of all runs are one task; validation losses and the ends of epochs are notices. What all runs have to say
    alike, as a warning about the base, is said once.
    """

    def __init__(self, members: Sequence[Member], on_event: OnEvent) -> None:
        self._on_event = on_event
        self._task = f"updates of {len(members)} runs"
        self._done, self._total = dict.fromkeys((member.name for member in members), 0), dict[str, int]()
        self._said: set[Notice] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        if self._total:  # a bar that is full disappears
            total = sum(self._total.values())
            self._on_event(Progress(self._task, total, total))

    def observer(self, name: str) -> Callable[[Event], None]:
        """What the events of a run go to."""

        def observe(event: Event) -> None:
            match event:
                case Notice():
                    if event not in self._said:
                        self._said.add(event)
                        self._on_event(Notice(f"{name}: {event.message}", event.kind))
                case Progress():
                    if event.task not in ("evaluating", "answering"):
                        self._on_event(event)
                case RunStarted():
                    self._total[name], self._done[name] = event.total_steps, event.resumed_step
                    self._count()
                case StepDone():
                    self._done[name] = event.step
                    self._count()
                case StepSkipped():
                    self._on_event(Notice(f"{name}: skipped a window, loss scale {event.loss_scale:g}"))
                case EvalDone():
                    best = ", the lowest yet" if event.best else ""
                    self._on_event(Notice(f"{name}: step {event.step}: validation loss {event.loss:.4f}{best}"))
                case EpochDone():
                    place = f"epoch {event.epoch} of {event.num_epochs:g}"
                    self._on_event(Notice(f"{name}: {place}: training loss {event.train_loss:.4f}"))
                case _:
                    pass

        return observe

    def _count(self) -> None:
        self._on_event(Progress(self._task, sum(self._done.values()), sum(self._total.values())))
