"""``llamatune extract-lora``: an adapter of the difference of two models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llamatune.command_options.conversion import ExtractOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.errors import Stopped, printable

if TYPE_CHECKING:
    from llamatune.checkpoints.extraction import ExtractReport


def extract_lora(options: ExtractOptions, console: Console) -> None:
    """Make an adapter of two models: what tuning changed."""
    with console:  # signals are handled from here on, also while torch is imported
        from llamatune.checkpoints.extraction import extract_lora as run_extraction
        from llamatune.output_files import write_output

        if options.plot is not None:
            from llamatune.reporting.chart_images import require_matplotlib

            require_matplotlib()
        if console.should_stop():
            raise Stopped("stopped before extracting", options.output, "run the same command again")
        report = run_extraction(options, console.on_event, console.should_stop)
        if options.plot is not None:
            from llamatune.reporting.energy_charts import energy_png

            write_output(options.plot, energy_png(report), options.overwrite)
        payload = asdict(report) | {"plot": None if options.plot is None else str(options.plot)}
        console.result(payload, lambda out: _print(out, report))


def _print(out: RichConsole, report: ExtractReport) -> None:
    from rich.table import Column, Table

    from llamatune.reporting.energy_charts import by_layer, by_module

    tables: dict[str, Mapping[int, Mapping[Any, float]]] = {"layer": by_layer(report), "module": by_module(report)}
    for title, shares in tables.items():
        table = Table(title, *(Column(f"rank {rank}", justify="right") for rank in shares))
        for group in next(iter(shares.values())):
            table.add_row(str(group), *(f"{values[group]:.4f}" for values in shares.values()))
        out.print(table)
    methods = sorted({matrix.method for matrix in report.matrices})
    found = f"{len(report.matrices):,} matrices, {' and '.join(methods)} SVD"
    out.print(f"retained energy {report.retained_energy:.6f} of {found}")
    note = "already extracted, left as it is: " if report.already_done else "written to "
    out.print(note + printable(report.output))
