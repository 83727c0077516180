"""``llamatune benchmark``: what each technique costs and saves, measured in a grid of small runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from llamatune.benchmarking.run_benchmark import Benchmark
    from llamatune.benchmarking.tables import Table


def benchmark(
    spec_path: Annotated[
        Path, typer.Argument(metavar="SPEC.yaml", help="The run spec.", show_default=False, readable=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE ...]", help="Changes to it in every cell; several values are an axis."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            help="An axis of the grid: a field of the spec, lora=on,off, or batch=1x1,8x1,1x8 (micro-batch x "
            "accumulation). The first cell is the one that ratios are taken to.",
        ),
    ] = None,
    preset_grid: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="techniques: LoRA, precision, accumulation and checkpointing on float32 weights (the default without "
            "--grid); checkpointing: every kind of it. --grid then changes its axes.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates in each cell; the first are warm-up and not timed.")] = 20,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Whole epochs in place of --steps.", show_default=False)
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N", help="Repeat each cell for its losses.", show_default="the spec's")
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="As 40GiB: cells that need more are out of memory.", show_default=False),
    ] = None,
    layout: Annotated[str, typer.Option(help="flat: a line a cell; nested: OFF and ON in lines and columns.")] = "flat",
    output: Annotated[Path, typer.Option(help="Where results are written.", readable=False)] = Path("benchmark-output"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move what is in the way aside.")] = False,
    json_mode: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")] = False,
) -> None:
    """Measure memory, speed and loss of every combination of techniques."""
    from llamatune.commands._arguments import as_utf8
    from llamatune.commands._console import Console
    from llamatune.errors import SpecError
    from llamatune.units import parse_size

    if layout not in ("flat", "nested"):
        raise SpecError(f"--layout is flat or nested, not {layout!r}")
    words = [as_utf8(text, "an override") for text in overrides or []]
    axes = [as_utf8(text, "an axis") for text in grid or []]
    chosen_seeds = None if seeds is None else _seeds(seeds)
    limit = None if memory_limit is None else parse_size(memory_limit, "--memory-limit")
    with Console(json_mode, writes=True) as console:
        from llamatune.benchmarking.cell_plan import BenchmarkOptions
        from llamatune.benchmarking.grid import is_axis
        from llamatune.benchmarking.run_benchmark import run_benchmark

        # `--grid A=1,2 B=3,4` reads as two axes, and is.
        axes += [word for word in words if is_axis(word)]
        fixed = [word for word in words if not is_axis(word)]
        options = BenchmarkOptions(
            spec_path, output, fixed, axes, preset_grid, steps, epochs, chosen_seeds, limit, overwrite
        )
        measured = run_benchmark(options, console.on_event, console.should_stop)
        payload = {**measured.payload(), "output": str(output)}
        console.result(payload, lambda out: _print(out, measured, layout, output))


def _seeds(text: str) -> tuple[int, ...]:
    from llamatune.errors import SpecError

    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) != len(parts):
        raise SpecError(f"{text!r} are no seeds", "--seeds", "write different numbers as 0,1,2")
    return tuple(int(part) for part in parts)


def _print(out: RichConsole, measured: Benchmark, layout: str, output: Path) -> None:
    from llamatune.benchmarking.tables import MEMORY, SPEED, effects_table, flat_table, nested_tables

    axes, results = measured.axes, measured.results
    parts = [flat_table(axes, results, [part]) for part in (MEMORY, SPEED)]  # side by side they are too wide
    for table in nested_tables(axes, results) if layout == "nested" else parts:
        _draw(out, table)
    _print_notes(out, parts[0].notes)
    if measured.effects:
        table = effects_table(measured.effects)
        _draw(out, table)
        _print_notes(out, table.notes)
    out.print(f"tables and chart are in {output}", markup=False)


def _draw(out: RichConsole, table: Table) -> None:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    for place, heading in enumerate(table.header):
        drawn.add_column(Text(heading), justify="left" if place < table.labels else "right")
    for row in table.rows:
        drawn.add_row(*(Text(text.replace(" (", "\n(")) for text in row))
    out.print(drawn)


def _print_notes(out: RichConsole, notes: Sequence[str]) -> None:
    for note in notes:
        out.print(f"- {note}", markup=False, soft_wrap=True)
