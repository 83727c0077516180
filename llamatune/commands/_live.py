"""Events on a terminal: bars for what is under way, lines for what is done."""

from __future__ import annotations

from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from llamatune.commands._units import gibibytes
from llamatune.errors import printable
from llamatune.events import (
    CheckpointSaved,
    EpochDone,
    EvalDone,
    Event,
    Notice,
    Progress,
    RunStarted,
    StepDone,
    StepSkipped,
)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would exit; here the caller decides what a closed pipe means."""
        raise BrokenPipeError


def open_console(file: IO[str]) -> Console:
    """A rich console on ``file``: as wide as the terminal, 120 columns elsewhere."""
    return _Console(file=file, width=None if file.isatty() else 120, highlight=False, soft_wrap=True)


class LiveDrawing:
    """Bars on a terminal; a finished task's bar disappears, the training bar stays."""

    def __init__(self, file: IO[str]) -> None:
        self._console = open_console(file)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._tasks: dict[str, object] = {}
        self._bars.start()

    def close(self) -> None:
        self._bars.stop()

    def _show(self, name: str, done: int, total: int | None, facts: str = "", keep: bool = False) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, facts="")
        task = self._tasks[name]
        self._bars.update(task, completed=done, total=total, facts=facts)  # type: ignore[arg-type]
        if total is not None and done >= total and not keep:
            self._bars.remove_task(self._tasks.pop(name))  # type: ignore[arg-type]

    def draw(self, event: Event) -> None:
        match event:
            case Notice():
                style = "yellow" if event.kind == "warning" else "dim"
                self._console.print(f"[{style}]{event.kind}:[/] {escape(printable(event.message))}")
            case Progress():
                self._show(event.task, event.done, event.total)
            case RunStarted():
                resumed = f", continuing after step {event.resumed_step}" if event.resumed_step else ""
                self._console.print(
                    f"training {event.trainable_parameters:,} of {event.total_parameters:,} parameters "
                    f"on {event.device}, {event.train_rows:,} rows{resumed}"
                )
            case StepDone():
                facts = (
                    f"loss {event.loss:.4f}  lr {event.learning_rate:.2e}  {event.tokens_per_second:,.0f} tok/s  "
                    f"peak {gibibytes(event.peak_memory_bytes)}"
                )
                self._show("training", event.step, event.total_steps, facts, keep=True)
            case StepSkipped():
                self._console.print(f"[yellow]overflow:[/] window {event.window}, loss scale {event.loss_scale:g}")
            case EvalDone():
                best = "  [green]best so far[/]" if event.best else ""
                self._console.print(
                    f"step {event.step}: validation loss {event.loss:.4f}, perplexity {event.perplexity:.2f}{best}"
                )
            case CheckpointSaved():
                self._console.print(f"[dim]saved {escape(printable(event.path))} in {event.seconds:.2f} s[/]")
            case EpochDone():
                self._console.print(
                    f"epoch {event.epoch} of {event.num_epochs}: train loss {event.train_loss:.4f}, "
                    f"perplexity {event.train_perplexity:.2f}"
                )
