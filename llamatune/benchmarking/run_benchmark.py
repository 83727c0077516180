"""``run_benchmark``: measures every cell of a grid in a process of its own, then writes tables and chart."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamatune.benchmarking.bar_chart import draw_chart
from llamatune.benchmarking.cell_plan import plan_benchmark
from llamatune.benchmarking.cell_runs import claimed_cells, facts_in_lines, machine_facts, measure_cells
from llamatune.benchmarking.effects import Effect, effects
from llamatune.benchmarking.results import Result, memory_unit, results_csv
from llamatune.benchmarking.tables import effects_table, flat_table, nested_tables
from llamatune.command_options.training import BenchmarkOptions
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.spec_grid import Axis
from llamatune.strict_json import dump_json
from llamatune.training.run_collection import refuse_other
from llamatune.training.run_directory import refuse_inputs, write_if_changed
from llamatune.training.run_file_names import CELLS


@dataclass(frozen=True)
class Benchmark:
    """The results in the grid's order, and the ``facts`` about version, machine and options."""

    axes: tuple[Axis, ...]
    results: list[Result]
    effects: list[Effect]
    facts: dict[str, Any]

    def payload(self) -> dict[str, Any]:
        """The content of ``benchmark.json``."""
        return {
            **self.facts,
            "axes": [asdict(axis) for axis in self.axes],
            "cells": list(self.results),
            "effects": [{"title": effect.title, **asdict(effect)} for effect in self.effects],
        }


def run_benchmark(
    options: BenchmarkOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> Benchmark:
    """Measure the cells that the output directory does not hold yet; write ``benchmark.{json,csv,md,png,svg}`` there.

    Raises:
        LlamatuneError: no cell can be measured, or the output directory cannot be used.
        Stopped: ``should_stop`` returned True; measured cells are kept, and the same call continues.
    """
    output = Path(os.path.realpath(options.output))
    refuse_other(output, CELLS, options.overwrite)
    grid, planned = plan_benchmark(options, on_event)
    for plan in planned:
        if plan.cell.spec is not None:
            refuse_inputs(plan.cell.spec, "--output", options.overwrite)
    with claimed_cells(output, options.overwrite):
        results = measure_cells(planned, output, _summary, on_event, should_stop)
        benchmark = Benchmark(grid.axes, results, effects(grid.axes, results), _facts(options, grid.fixed))
        _write(output, benchmark, on_event)
    return benchmark


def _summary(facts: Result) -> str:
    unit, size = memory_unit([facts])
    return (
        f"peak {facts['allocated_bytes'] / size:,.1f} {unit}, {facts['step_s']:.3f} s a step, "
        f"{facts['tokens_per_second']:,.0f} tokens/s, loss {facts['losses'][0]:.4f}"
    )


def _facts(options: BenchmarkOptions, fixed: tuple[str, ...]) -> dict[str, Any]:
    return {
        **machine_facts(),
        "spec": str(options.spec_path),
        "overrides": [*fixed, *options.overrides],
        "steps": options.updates,
        "epochs": options.epochs,
        "seeds": options.seeds,
        "memory_limit_bytes": options.memory_limit_bytes,
    }


def markdown(benchmark: Benchmark) -> str:
    """The content of ``benchmark.md``: the facts, then every table."""
    tables = [flat_table(benchmark.axes, benchmark.results)]
    if benchmark.effects:
        tables.append(effects_table(benchmark.effects))
    tables += nested_tables(benchmark.axes, benchmark.results)
    return f"# Benchmark\n\n{facts_in_lines(benchmark.facts)}\n\n" + "\n".join(table.markdown() for table in tables)


def _write(output: Path, benchmark: Benchmark, on_event: OnEvent) -> None:
    files = {
        "json": dump_json(benchmark.payload()),
        "csv": results_csv(benchmark.axes, benchmark.results).encode(),
        "md": markdown(benchmark).encode(),
    }
    try:
        files |= draw_chart(benchmark.axes, benchmark.results)
    except ImportError:
        on_event(Notice("no chart without matplotlib: pip install matplotlib"))
    for kind, content in files.items():
        write_if_changed(output / f"benchmark.{kind}", content)
