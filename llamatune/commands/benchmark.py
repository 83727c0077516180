"""``llamatune benchmark``: memory, speed and loss of each technique, or of generation, measured in a grid of cells."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from llamatune.command_options.training import BenchmarkOptions
from llamatune.commands._console import Console, RichConsole
from llamatune.commands._text_tables import print_notes, print_table
from llamatune.errors import printable

if TYPE_CHECKING:
    from llamatune.benchmarking.run_benchmark import Benchmark
    from llamatune.benchmarking.run_generation import GenerationBenchmark


def benchmark(options: BenchmarkOptions, console: Console) -> None:
    """Measure memory, speed and loss of every combination of techniques, or the speed of generation."""
    with console:
        if options.generate:
            from llamatune.benchmarking.run_generation import run_generation_benchmark

            generation = run_generation_benchmark(options, console.on_event, console.should_stop)
            payload = {**generation.payload(), "output": str(options.output)}
            console.result(payload, lambda out: _print_generation(out, generation, options))
            return
        from llamatune.benchmarking.run_benchmark import run_benchmark
        from llamatune.spec_grid import is_axis

        # `--grid A=1,2 B=3,4` reads as two axes, and is.
        axes = [*options.grid, *(text for text in options.overrides if is_axis(text))]
        fixed = [text for text in options.overrides if not is_axis(text)]
        options = replace(options, overrides=fixed, grid=axes)
        measured = run_benchmark(options, console.on_event, console.should_stop)
        payload = {**measured.payload(), "output": str(options.output)}
        console.result(payload, lambda out: _print(out, measured, options))


def _print(out: RichConsole, measured: Benchmark, options: BenchmarkOptions) -> None:
    from llamatune.benchmarking.tables import MEMORY, SPEED, effects_table, flat_table, nested_tables

    axes, results = measured.axes, measured.results
    parts = [flat_table(axes, results, [part]) for part in (MEMORY, SPEED)]  # side by side they are too wide
    for table in nested_tables(axes, results) if options.layout == "nested" else parts:
        print_table(out, table, dense=True)
    print_notes(out, flat_table(axes, results).notes)
    if measured.effects:
        table = effects_table(measured.effects)
        print_table(out, table, dense=True)
        print_notes(out, table.notes)
    out.print(f"tables and chart are in {printable(str(options.output))}")


def _print_generation(out: RichConsole, measured: GenerationBenchmark, options: BenchmarkOptions) -> None:
    from llamatune.benchmarking.generation_tables import generation_table
    from llamatune.benchmarking.tables import MEMORY, SPEED

    parts = [generation_table(measured.axes, measured.results, [part]) for part in (SPEED, MEMORY)]
    for table in parts:
        print_table(out, table, dense=True)
    print_notes(out, parts[0].notes)
    out.print(f"the table is in {printable(str(options.output))}")
