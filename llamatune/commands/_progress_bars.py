"""The display of progress on a terminal: bars, the panel of a training run with its time left, lines above them."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from llamatune import events
from llamatune.errors import printable
from llamatune.units import duration, epoch_text, gibibytes, perplexity, perplexity_text

_REDRAWN_EVERY_S = 0.5
_LEVELS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.,-=+*#"
_MOST_POINTS = 512
_SHOWN = 80
_KEPT = "\n\t"


class _Console(Console):
    """Texts are shown as they are: no markup, and what is not printable, but line breaks and tabs, is escaped."""

    def __init__(self, file: IO[str]) -> None:
        width = None if file.isatty() else 120
        super().__init__(file=file, width=width, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Strings are escaped before their width is measured."""
        return super().render_str(printable(text, _KEPT), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Texts that come in another way, as ``Text``, are escaped at last."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control or text.isprintable() else Segment(printable(text, _KEPT), style)

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
    return _Console(file)


class ProgressBars:
    """Bars on a terminal, and a panel while a run trains. The bar of a finished task disappears, the panel stays.

    Drawn when an event comes, at most twice a second and in no thread of its own, so that it does not slow training.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        counts = (
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
        )
        self._bars = Bars(TextColumn("{task.description}", markup=False), *counts, console=console)
        self._tasks: dict[str, TaskID] = {}
        self._panel: TrainingPanel | None = None
        self._drawn = 0.0
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._drawing)
        self._live.start()

    def close(self) -> None:
        self._live.stop()

    def _drawing(self) -> RenderableType:
        return Group(*([self._panel] if self._panel else []), *([self._bars] if self._bars.tasks else []))

    def draw(self, event: events.Event) -> None:
        if isinstance(event, events.Progress):
            self._count(event)
        if isinstance(event, events.RunStarted):
            self._panel = TrainingPanel(event)
        if self._panel is not None:
            self._panel.note(event)
        if line := self._line(event):
            self._console.print(line)
        if time.monotonic() - self._drawn >= _REDRAWN_EVERY_S:
            self._live.refresh()
            self._drawn = time.monotonic()

    def _count(self, event: events.Progress) -> None:
        if event.task not in self._tasks:
            self._tasks[event.task] = self._bars.add_task(event.task, total=event.total, speed="")
        speed = "" if event.tokens_per_second is None else f"{event.tokens_per_second:,.0f} tokens/s"
        self._bars.update(self._tasks[event.task], completed=event.done, total=event.total, speed=speed)
        if event.total is not None and event.done >= event.total:
            self._bars.remove_task(self._tasks.pop(event.task))

    def _line(self, event: events.Event) -> str | Text | None:
        """The line that stays above the bars and the panel."""
        match event:
            case events.Notice():
                style = "yellow" if event.kind == "warning" else "dim"
                return Text.assemble((f"{event.kind}:", style), f" {printable(event.message)}")
            case events.RunStarted():
                parameters = f"{event.trainable_parameters:,} of {event.total_parameters:,} parameters"
                resumed = f", continuing after step {event.resumed_step}" if event.resumed_step else ""
                return f"training {parameters} on {event.device}, {event.train_rows:,} rows{resumed}"
            case events.StepSkipped():
                return Text.assemble(
                    ("overflow:", "yellow"), f" window {event.window}, loss scale {event.loss_scale:g}"
                )
            case events.EvalDone():
                best = ("  best so far" if event.best else "", "green")
                when = f"step {event.step}" if event.step else f"before training ({duration(event.seconds)})"
                return Text.assemble(f"{when}: validation loss {_losses(event.loss, event.perplexity)}", best)
            case events.EpochDone():
                epoch, losses = min(event.epoch, event.num_epochs), _losses(event.train_loss, event.train_perplexity)
                return f"epoch {epoch} of {event.num_epochs}: train loss {losses}"
        return None


def _losses(loss: float, perplexity: float) -> str:
    return f"{loss:.4f}, perplexity {perplexity_text(perplexity)}"


class Curve:
    """A series of any length as at most 512 means over equally long stretches, drawn over the width that is free."""

    def __init__(self) -> None:
        self._means: list[float] = []
        self._stretch, self._sum, self._count = 1, 0.0, 0

    def add(self, value: float) -> None:
        self._sum += value
        self._count += 1
        if self._count == self._stretch:
            self._means.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
        if len(self._means) == _MOST_POINTS:
            self._means = [sum(pair) / 2 for pair in zip(self._means[::2], self._means[1::2], strict=True)]
            self._stretch *= 2

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.sparkline(options.max_width, options.ascii_only), style="cyan", no_wrap=True)

    def sparkline(self, width: int, ascii_only: bool = False) -> str:
        """The curve in ``width`` columns, or fewer while there is less to show.

        The highest level is reached by the highest tenth: the first losses of a run would flatten all others.
        """
        count, levels = min(width, len(self._means)), _ASCII_LEVELS if ascii_only else _LEVELS
        if not count:
            return ""
        edges = [round(column * len(self._means) / count) for column in range(count + 1)]
        means = [sum(self._means[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
        low, high = min(means), sorted(means)[math.ceil(0.9 * (count - 1))]
        heights = ((min(mean, high) - low) / (high - low) if high > low else 0.0 for mean in means)
        return "".join(levels[round(height * (len(levels) - 1))] for height in heights)


class TrainingPanel:
    """The state of a run after its events so far, drawn as a panel of any width."""

    def __init__(self, started: events.RunStarted) -> None:
        self._started = started
        self._losses = Curve()
        self._first: events.StepDone | None = None
        self._best: events.EvalDone | None = None
        self._at_start: float | None = None
        self._step: events.StepDone | None = None
        self._evaluation: events.EvalDone | None = None
        self._answers: events.AnswersDone | None = None
        self._saved: events.CheckpointSaved | None = None
        self._memory: events.MemoryHeld | None = None

    def note(self, event: events.Event) -> None:
        match event:
            case events.StepDone():
                self._losses.add(event.loss)
                self._first, self._step = self._first or event, event
            case events.EvalDone():
                self._at_start = self._at_start if event.step else event.loss
                self._evaluation = event
                self._best = event if event.best else self._best
            case events.AnswersDone():
                self._answers = event
            case events.CheckpointSaved():
                self._saved = event
            case events.MemoryHeld():
                self._memory = event

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = Table.grid(Column(style="dim", no_wrap=True), Column(ratio=1), padding=(0, 2), expand=True)
        for label, content in self._rows():
            rows.add_row(label, content)
        title = Text(printable(f"training on {self._started.device}"))
        panel = Panel(Group(self._progress(), rows), title=title, title_align="left", border_style="dim")
        # The console leaves lines alone that do not fit; inside the frame they are wrapped.
        yield from console.render(panel, options.update(no_wrap=False, overflow="fold"))

    def _progress(self) -> RenderableType:
        step, total, epoch = self._started.resumed_step, self._started.total_steps, ""
        if self._step is not None:
            step, epochs = self._step.step, self._started.num_epochs
            epoch = f", epoch {epoch_text(self._step.epoch, epochs)} of {epochs}"
        line = Table.grid(Column(ratio=1), Column(no_wrap=True, justify="right"), padding=(0, 2), expand=True)
        line.add_row(ProgressBar(total, step, complete_style="cyan"), f"step {step:,} of {total:,}{epoch}")
        return line

    def _rows(self) -> list[tuple[str, RenderableType]]:
        rows: list[tuple[str, RenderableType]] = []
        if (step := self._step) is not None:
            rows += [
                ("loss", self._loss(step)),
                ("update", f"learning rate {step.learning_rate:.2e}, gradient norm {step.grad_norm:.3g}"),
                ("speed", f"{step.tokens_per_second:,.0f} tokens/s"),
                ("time", self._time(step)),
                ("peak memory", self._peak(step)),
            ]
        if self._memory is not None:
            rows.append(("of which", self._held(self._memory)))
        if self._evaluation is not None:
            rows.append(("validation", self._validation(self._evaluation)))
        if self._answers is not None and self._answers.answers:
            rows.append(("an answer", self._answer(self._answers)))
        if self._saved is not None:
            name = printable(Path(self._saved.path).name)
            rows.append(("checkpoint", f"{name}, saved in {self._saved.seconds:.2f} s"))
        return rows

    def _loss(self, step: events.StepDone) -> RenderableType:
        line = Table.grid(Column(no_wrap=True), Column(ratio=1), padding=(0, 2), expand=True)
        line.add_row(_losses(step.loss, perplexity(step.loss)), self._losses)
        return line

    def _time(self, step: events.StepDone) -> str:
        elapsed = f"{duration(step.elapsed_s)} elapsed"
        if self._first is None or self._first is step or step.step == step.total_steps:
            return elapsed
        pace_s = (step.elapsed_s - self._first.elapsed_s) / (step.step - self._first.step)
        return f"{elapsed}, {duration(pace_s * (step.total_steps - step.step))} left"

    def _peak(self, step: events.StepDone) -> str:
        size = f" of {gibibytes(self._memory.device_bytes)}" if self._memory else ""
        reserved = step.peak_reserved_bytes
        rest = "resident" if reserved is None else f"{gibibytes(reserved)} reserved"
        return f"{gibibytes(step.peak_memory_bytes)}{size}, {rest}"

    def _held(self, memory: events.MemoryHeld) -> str:
        weights = gibibytes(memory.frozen_bytes or memory.trained_bytes)
        adapter = f", adapter {gibibytes(memory.trained_bytes)}" if memory.frozen_bytes else ""
        return f"weights {weights}{adapter}, optimizer {gibibytes(memory.optimizer_bytes)}"

    def _answer(self, done: events.AnswersDone) -> str:
        """One of the answers, another at each evaluation, cut to a line or two."""
        answer = done.answers[done.step % len(done.answers)]
        short = (" ".join(text.split()) for text in (answer.prompt, answer.answer))
        prompt, text = (one if len(one) <= _SHOWN else f"{one[:_SHOWN]}..." for one in short)
        return f"{prompt} -> {text}" + (f", at step {done.step:,}" if done.step else ", before training")

    def _validation(self, evaluation: events.EvalDone) -> str:
        losses = _losses(evaluation.loss, evaluation.perplexity)
        if not evaluation.step:
            return f"{losses} before training"
        losses = f"{losses} at step {evaluation.step:,}"
        if evaluation.best:
            losses = f"{losses}, the best"
        elif self._best:
            losses = f"{losses}; best {self._best.loss:.4f} at step {self._best.step:,}"
        return f"{losses}; {self._at_start:.4f} before training" if self._at_start is not None else losses
