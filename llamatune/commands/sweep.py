"""``llamatune sweep``: a run of every combination of values, those that share a base together; a table and a page."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from llamatune.command_options.sweep import SweepOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.errors import printable

if TYPE_CHECKING:
    from llamatune.sweeping.run_sweep import Sweep


def sweep(options: SweepOptions, console: Console) -> None:
    """Train a run for every combination of values, several at once on one base, and compare them."""
    began_s = time.monotonic()  # of training.max_time, before torch is loaded
    with console:
        from llamatune.sweeping.run_sweep import PAGE, run_sweep

        done = run_sweep(options, console.on_event, console.should_stop, began_s)
        page = str(options.output / PAGE) if done.has_page else None
        payload = {**done.payload(), "report": page}
        console.result(payload, lambda out: _print(out, done))


def _print(out: RichConsole, done: Sweep) -> None:
    from rich import box
    from rich.table import Table

    from llamatune.sweeping.sweep_table import header_and_rows, notes

    header, rows = header_and_rows(done.axes, done.runs, done.best)
    drawn = Table(title="sweep", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for place, heading in enumerate(header):
        drawn.add_column(heading, justify="left" if place <= len(done.axes) else "right")
    for row in rows:
        drawn.add_row(*row)
    out.print(drawn)
    for note in notes(done.runs, done.best):
        out.print(printable(note), soft_wrap=True)
    made = "runs, table and page" if done.has_page else "runs and table"
    out.print(f"{made} are in {printable(str(done.output))}")
