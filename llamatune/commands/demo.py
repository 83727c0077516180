"""``llamatune demo``: preparing, training, comparing and merging in a few minutes, on data in the package."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from llamatune.command_options.training import DemoOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.errors import printable

if TYPE_CHECKING:
    from llamatune.demo.run_demo import DemoReport

_SHOWN = 8


def demo(options: DemoOptions, console: Console) -> None:
    """Run the whole job on a tiny model: prepare, count, train, compare, merge."""
    console.log_every_steps = 10
    with console:
        from llamatune.demo.run_demo import run_demo

        report = run_demo(options.output, console.on_event, console.should_stop)
        console.result(asdict(report), lambda out: _print(out, report))


def _print(out: RichConsole, report: DemoReport) -> None:
    from rich.table import Table
    from rich.text import Text

    from llamatune.units import duration, gibibytes

    table = Table(title="held-out questions, before and after LoRA", title_justify="left", show_lines=True)
    table.add_column("question about a town that training never asked about", ratio=4)
    table.add_column("base", ratio=5)
    table.add_column("tuned", ratio=2)
    for row in report.held_out[:_SHOWN]:
        style = "green" if row.tuned == row.expected else "red"
        table.add_row(
            row.question, Text(printable(row.base.strip()), style="dim"), Text(printable(row.tuned), style=style)
        )
    out.print(table)
    out.print("The base was trained on the text of an invented atlas, without questions.")
    asked = len(report.held_out)
    out.print(
        f"exact match on {asked} held-out questions: base {report.base_exact_match:.1f} %, "
        f"tuned {report.tuned_exact_match:.1f} %, merged {report.merged_exact_match:.1f} %"
    )
    out.print(
        f"trained {report.trainable_parameters:,} parameters on top of {report.base_parameters:,} "
        f"in {duration(report.training_s)}, peak memory {gibibytes(report.peak_memory_bytes)}"
    )
    out.print(f"everything is in {printable(report.output)}")
