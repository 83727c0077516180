"""``llamatune report``: a page of curves, tables and findings about run directories."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from llamatune.command_options.training import ReportOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.errors import printable

if TYPE_CHECKING:
    from llamatune.reporting.report_data import Report


def report(options: ReportOptions, console: Console) -> None:
    """Make a page about one run, or compare several: curves, tables, diagnosis."""
    with console:
        from llamatune.reporting.make_report import make_report

        report = make_report(options, console.on_event, console.should_stop)
        console.result(asdict(report), lambda out: _print(out, report))


def _print(out: RichConsole, page: Report) -> None:
    from rich.table import Column, Table

    from llamatune.reporting.report_text import figure_rows, findings

    table = Table("", *(Column(run.name, justify="right") for run in page.runs))
    table.add_row("status", *(run.status for run in page.runs))
    for label, values in figure_rows([run.figures for run in page.runs]):
        table.add_row(label, *values)
    out.print(table)
    for run in page.runs:
        for sentence in [*run.notices, *findings(run.diagnosis)]:
            out.print(printable(f"{run.name}: {sentence}"))
    out.print(f"written to {printable(page.output)}")
