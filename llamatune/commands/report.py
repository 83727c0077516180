"""``llamatune report``: a page of curves, tables and findings about run directories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llamatune.options.training import ReportOptions

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from llamatune.reporting.contents import Report


def report(
    options: ReportOptions,
    json_mode: Annotated[bool, typer.Option("--json", help="Print the same figures as one JSON object.")] = False,
) -> None:
    """Make a page about one run, or compare several: curves, tables, diagnosis."""
    from llamatune.commands._console import Console

    with Console(json_mode, writes=True) as console:
        from llamatune.reporting.report import make_report, report_as_json

        page = make_report(options, console.on_event, console.should_stop)
        console.result(report_as_json(page), lambda out: _print(out, page))


def _print(out: RichConsole, page: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    from llamatune.errors import printable
    from llamatune.reporting.wording import figure_rows, findings

    table = Table()
    table.add_column("")
    for run in page.runs:
        table.add_column(Text(run.name), justify="right")
    table.add_row("status", *(run.status for run in page.runs))
    for label, values in figure_rows([run.figures for run in page.runs]):
        table.add_row(label, *values)
    out.print(table)
    for run in page.runs:
        for sentence in [*run.notices, *findings(run.diagnosis)]:
            out.print(Text(f"{run.name}: {sentence}"))
    out.print(Text(f"written to {printable(page.output)}"))
