"""The display of progress on a terminal: bars, the panel of a run, lines above them; the console of results."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from llamatune import events
from llamatune.commands._terminal_modes import silence_keys
from llamatune.commands._training_panel import TrainingPanel, losses_text
from llamatune.errors import printable
from llamatune.units import duration, gibibytes

_REDRAWN_EVERY_S = 0.5
_KEPT = "\n\t"
_UNBOUND = 10_000


class _Console(Console):
    """Texts are shown as they are: no markup, and what is not printable, but line breaks and tabs, is escaped.

    Tables have lines on a terminal that is wide enough; elsewhere, as in a log, their columns stand apart by spaces.
    Cells are folded where rich would cut them; a table of many columns whose words do not fit has a line a cell.
    """

    def __init__(self, file: IO[str]) -> None:
        width = None if file.isatty() else 120
        super().__init__(file=file, width=width, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Strings are escaped before their width is measured."""
        return super().render_str(printable(text, _KEPT), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Texts that come in another way, as ``Text``, are escaped at last."""
        lined = True
        if isinstance(renderable, Table) and renderable.box is not None:
            room = (options or self.options).max_width
            fits = self._least_width(renderable) <= room or not _has_figures(renderable)
            lined = self.file.isatty() and fits
            table = _whole_cells(renderable, lined)
            if not fits and self._least_width(table) > room:
                table = _a_line_a_cell(table)
            if _has_figures(renderable) and self._least_width(table) <= room:
                self._keep_words(table, room)
            renderable = table
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control or text.isprintable() else Segment(printable(text, _KEPT), style)
        if not lined:
            yield Segment.line()

    def _least_width(self, table: Table) -> int:
        """With no word broken."""
        return self._widths(table).minimum

    def _widths(self, renderable: RenderableType) -> Measurement:
        return Measurement.get(self, self.options.update(width=_UNBOUND), renderable)

    def _keep_words(self, table: Table, room: int) -> None:
        """Give each column the width of its longest word, and what is left of ``room`` to those that lack most of it.

        Rich narrows the widest column, though it may hold one word.
        """
        columns = []
        for column in table.columns:
            cells = [*column.cells, *([column.header] if table.show_header else [])]
            found = [self._widths(cell) for cell in cells] or [Measurement(0, 0)]
            columns.append((max(one.minimum for one in found), max(one.maximum for one in found)))
        widths = [least for least, _ in columns]
        for _ in range(room - self._least_width(table)):
            lacking = [most - width for (_, most), width in zip(columns, widths, strict=True)]
            if not any(lacking):
                break
            widths[lacking.index(max(lacking))] += 1
        for column, width in zip(table.columns, widths, strict=True):
            column.width = width

    def on_broken_pipe(self) -> None:
        """Rich would exit; here the caller decides what a closed pipe means."""
        raise BrokenPipeError

    @property
    def encoding(self) -> str:
        """Of the characters drawn; the stream itself is always UTF-8."""
        return super().encoding if speaks_utf8() or not self.file.isatty() else "ascii"


def _whole_cells(table: Table, lined: bool) -> Table:
    """The table with cells that are folded and not cut, and without its lines if not ``lined``."""
    whole = copy.copy(table)
    whole.columns = [copy.copy(column) for column in table.columns]
    for column in whole.columns:
        column.overflow = "fold"
    if not lined:
        whole.box, whole.pad_edge, whole.padding = None, False, (0, 2, 0, 0)
    return whole


def speaks_utf8() -> bool:
    """Whether the locale is a UTF-8 one."""
    names = (os.environ.get(name) for name in ("LC_ALL", "LC_CTYPE", "LANG"))
    return "utf" in next((name.lower() for name in names if name), "")


def open_console(file: IO[str]) -> Console:
    """A rich console on ``file``: as wide as the terminal, 120 columns elsewhere."""
    return _Console(file)


def _has_figures(table: Table) -> bool:
    """Whether it is one of many columns, of figures mostly; columns of texts share the width."""
    return len(table.columns) > 2 and not any(column.ratio for column in table.columns)


def _a_line_a_cell(table: Table) -> Table:
    """Heading and cell on each line, and a blank line between the table's rows."""
    shown = Table(title=table.title, title_justify="left", box=None, show_header=False, pad_edge=False)
    shown.add_column(overflow="fold")
    shown.add_column(overflow="fold")
    for row in zip(*(column.cells for column in table.columns), strict=True):
        for column, cell in zip(table.columns, row, strict=True):
            heading = column.header if table.show_header else ""
            shown.add_row(" ".join(heading.split()) if isinstance(heading, str) else heading, cell)
        shown.add_row()
    return shown


class ProgressBars:
    """Bars on a terminal, and a panel while a run trains. The bar of a finished task disappears, the panel stays.

    Drawn when an event comes, at most twice a second and in no thread of its own, so that it does not slow training.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        counts = (
            BarColumn(24),
            TextColumn("{task.fields[count]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
        )
        self._bars = Bars(TextColumn("{task.description}", markup=False), *counts, console=console)
        self._tasks: dict[str, TaskID] = {}
        self._panel: TrainingPanel | None = None
        self._drawn = 0.0
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._drawing)
        self._restore_terminal: Callable[[], None] = lambda: None
        self._live.start()

    def close(self) -> None:
        self._live.stop()
        self._restore_terminal()

    def _drawing(self) -> RenderableType:
        return Group(*([self._panel] if self._panel else []), *([self._bars] if self._bars.tasks else []))

    def draw(self, event: events.Event) -> None:
        if isinstance(event, events.Progress):
            self._count(event)
        if isinstance(event, events.RunStarted):
            self._restore_terminal()
            self._restore_terminal = silence_keys(self._console.file)
            self._panel = TrainingPanel(event)
        if self._panel is not None:
            self._panel.note(event)
        if line := self._line(event):
            # A command is pasted: the terminal may wrap it, but no line end is put into it.
            self._console.print(line, soft_wrap=isinstance(event, events.Command))
        if time.monotonic() - self._drawn >= _REDRAWN_EVERY_S:
            self._live.refresh()
            self._drawn = time.monotonic()

    def _count(self, event: events.Progress) -> None:
        if event.task not in self._tasks:
            self._tasks[event.task] = self._bars.add_task(event.task, total=None, speed="", count="")
        speed = "" if event.tokens_per_second is None else f"{event.tokens_per_second:,.0f} tokens/s"
        end = None if event.share is None else 1.0
        task, count = self._tasks[event.task], _count_text(event)
        self._bars.update(task, completed=event.share, total=end, speed=speed, count=count)
        if event.total is not None and event.done >= event.total:
            self._bars.remove_task(self._tasks.pop(event.task))

    def _line(self, event: events.Event) -> str | Text | None:
        """The line that stays above the bars and the panel."""
        match event:
            case events.Notice():
                style = "yellow" if event.kind == "warning" else "dim"
                return Text.assemble((f"{event.kind}:", style), f" {printable(event.message)}")
            case events.Command():
                return Text(f"$ {printable(event.line)}", style="bold")
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
                return Text.assemble(f"{when}: validation loss {losses_text(event.loss, event.perplexity)}", best)
            case events.EpochDone():
                epoch, losses = (
                    min(event.epoch, event.num_epochs),
                    losses_text(event.train_loss, event.train_perplexity),
                )
                return f"epoch {epoch} of {event.num_epochs}: train loss {losses}"
        return None


def _count_text(event: events.Progress) -> str:
    """``3/8``, ``1,234`` of a number that is not known, or ``1.20 GiB of 12.55 GiB``."""
    if event.total is None:
        return f"{event.done:,}"
    if event.in_bytes:
        return f"{gibibytes(event.done)} of {gibibytes(event.total)}"
    return f"{event.done:,}/{event.total:,}"
