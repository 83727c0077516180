"""``llamatune report``: run directories in, one page of curves, tables and findings out."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from llamatune.reporting.report_data import Report


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories; several are compared.", readable=False)
    ],
    output: Annotated[
        Path, typer.Option(help="The page, one HTML file that needs nothing else.", show_default=False, readable=False)
    ],
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="The charts as a picture too.")] = None,
    smoothing: Annotated[float, typer.Option(help="Decay of the moving average; 0 draws none.")] = 0.95,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Show each run's answer before and after tuning. Repeatable.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="One prompt a line, or rows in JSON or JSON Lines.", readable=False)
    ] = None,
    generations: Annotated[
        Path | None, typer.Option(help="Show what generate --compare --output wrote.", readable=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most that is generated.")] = 128,
    device: Annotated[str, typer.Option(help="What generates: auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands at --output and --png.")] = False,
    json_mode: Annotated[bool, typer.Option("--json", help="Print the same figures as one JSON object.")] = False,
) -> None:
    """Make a page about one run, or compare several: curves, tables, diagnosis."""
    from llamatune.commands._console import Console

    with Console(json_mode, writes=True) as console:
        from llamatune.commands._arguments import given_prompts
        from llamatune.reporting.make_report import ReportOptions, make_report

        options = ReportOptions(
            runs,
            output,
            png,
            smoothing,
            given_prompts(prompt, prompt_file),
            generations,
            max_new_tokens,
            device,
            overwrite,
        )
        made = make_report(options, console.on_event, console.should_stop)
        console.result(asdict(made), lambda out: _print(out, made))


def _print(out: RichConsole, made: Report) -> None:
    from rich.table import Table
    from rich.text import Text

    from llamatune.errors import printable
    from llamatune.reporting.report_text import figure_rows, findings

    table = Table()
    table.add_column("")
    for run in made.runs:
        table.add_column(Text(run.name), justify="right")
    table.add_row("status", *(run.status for run in made.runs))
    for label, values in figure_rows([run.figures for run in made.runs]):
        table.add_row(label, *values)
    out.print(table)
    for run in made.runs:
        for sentence in [*run.notices, *findings(run.diagnosis)]:
            out.print(Text(f"{run.name}: {sentence}"))
    out.print(Text(f"written to {printable(made.output)}"))
