"""Terminal output of events: progress bars, the panel of a training run, and lines above them."""

from __future__ import annotations

import os
import time
from typing import IO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from llamatune.commands._training_panel import TrainingPanel
from llamatune.errors import printable
from llamatune.events import EpochDone, EvalDone, Event, Notice, Progress, RunStarted, StepSkipped

_REDRAWN_EVERY_S = 0.5


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would exit; here the caller decides what a closed pipe means."""
        raise BrokenPipeError

    @property
    def encoding(self) -> str:
        """Of the characters drawn; the stream itself is always UTF-8."""
        return super().encoding if speaks_utf8() or not self.file.isatty() else "ascii"


def speaks_utf8() -> bool:
    """Whether the locale is a UTF-8 one."""
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_CTYPE", "LANG"))
    return "utf" in next((name.lower() for name in names if name), "")


def open_console(file: IO[str]) -> Console:
    """A rich console on ``file``: as wide as the terminal, 120 columns elsewhere."""
    return _Console(file=file, width=None if file.isatty() else 120, highlight=False, soft_wrap=True)


class ProgressBars:
    """Bars on a terminal, and a panel while a run trains. The bar of a finished task disappears, the panel stays.

    Drawn when an event comes, at most twice a second and in no thread of its own, so that it does not slow training.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Bars(*columns, console=console)
        self._tasks: dict[str, TaskID] = {}
        self._panel: TrainingPanel | None = None
        self._drawn = 0.0
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._drawing)
        self._live.start()

    def close(self) -> None:
        self._live.stop()

    def _drawing(self) -> RenderableType:
        return Group(*([self._panel] if self._panel else []), *([self._bars] if self._bars.tasks else []))

    def draw(self, event: Event) -> None:
        if isinstance(event, Progress):
            self._count(event)
        if isinstance(event, RunStarted):
            self._panel = TrainingPanel(event)
        if self._panel is not None:
            self._panel.note(event)
        if line := self._line(event):
            self._console.print(line)
        if time.monotonic() - self._drawn >= _REDRAWN_EVERY_S:
            self._live.refresh()
            self._drawn = time.monotonic()

    def _count(self, event: Progress) -> None:
        if event.task not in self._tasks:
            self._tasks[event.task] = self._bars.add_task(event.task, total=event.total)
        self._bars.update(self._tasks[event.task], completed=event.done, total=event.total)
        if event.total is not None and event.done >= event.total:
            self._bars.remove_task(self._tasks.pop(event.task))

    def _line(self, event: Event) -> str | None:
        """The line that stays above the bars and the panel."""
        match event:
            case Notice():
                style = "yellow" if event.kind == "warning" else "dim"
                return f"[{style}]{event.kind}:[/] {escape(printable(event.message))}"
            case RunStarted():
                parameters = f"{event.trainable_parameters:,} of {event.total_parameters:,} parameters"
                resumed = f", continuing after step {event.resumed_step}" if event.resumed_step else ""
                return f"training {parameters} on {event.device}, {event.train_rows:,} rows{resumed}"
            case StepSkipped():
                return f"[yellow]overflow:[/] window {event.window}, loss scale {event.loss_scale:g}"
            case EvalDone():
                best = "  [green]best so far[/]" if event.best else ""
                return f"step {event.step}: validation loss {event.loss:.4f}, perplexity {event.perplexity:.2f}{best}"
            case EpochDone():
                losses = f"train loss {event.train_loss:.4f}, perplexity {event.train_perplexity:.2f}"
                return f"epoch {event.epoch} of {event.num_epochs}: {losses}"
        return None
