"""``run_generation_benchmark``: measures generation in every cell of a grid, then writes one table."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamatune.benchmarking.cell_runs import claimed_cells, facts_in_lines, machine_facts, measure_cells
from llamatune.benchmarking.generation_cells import plan_generation_cells
from llamatune.benchmarking.generation_tables import generation_csv, generation_table
from llamatune.benchmarking.results import Result, memory_unit, only_measured
from llamatune.command_options.generation_grid import REPETITIONS
from llamatune.command_options.training import BenchmarkOptions
from llamatune.events import OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.spec_grid import Axis
from llamatune.strict_json import dump_json
from llamatune.training.run_collection import refuse_other
from llamatune.training.run_directory import write_if_changed
from llamatune.training.run_file_names import CELLS


@dataclass(frozen=True)
class GenerationBenchmark:
    """The results in the grid's order, and the ``facts`` about version, machine and options."""

    axes: tuple[Axis, ...]
    results: list[Result]
    facts: dict[str, Any]

    def payload(self) -> dict[str, Any]:
        """The content of ``benchmark.json``."""
        return {**self.facts, "axes": [asdict(axis) for axis in self.axes], "cells": list(self.results)}

    def markdown(self) -> str:
        """The content of ``benchmark.md``: the facts, then the table."""
        table = generation_table(self.axes, self.results).markdown()
        return f"# Benchmark of generation\n\n{facts_in_lines(self.facts)}\n\n{table}"


def run_generation_benchmark(
    options: BenchmarkOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> GenerationBenchmark:
    """Measure the cells that the output directory does not hold yet; write ``benchmark.{json,csv,md}`` there.

    Raises:
        LlamatuneError: no cell can be measured, or the output directory cannot be used.
        Stopped: ``should_stop`` returned True; measured cells are kept, and the same call continues.
    """
    output = Path(os.path.realpath(options.output))
    refuse_other(output, CELLS, options.overwrite)
    axes, planned = plan_generation_cells(options, on_event)
    with claimed_cells(output, options.overwrite):
        results = measure_cells(planned, output, _summary, on_event, should_stop)
        benchmark = GenerationBenchmark(axes, results, _facts(options, results))
        files = {
            "json": dump_json(benchmark.payload()),
            "csv": generation_csv(axes, results).encode(),
            "md": benchmark.markdown().encode(),
        }
        for kind, content in files.items():
            write_if_changed(output / f"benchmark.{kind}", content)
    return benchmark


def _summary(facts: Result) -> str:
    unit, size = memory_unit([facts])
    return (
        f"prefill {facts['prefill_tokens_per_second']:,.0f} tokens/s, decode "
        f"{facts['decode_tokens_per_second']:,.0f} tokens/s, {facts['bandwidth_fraction']:.0%} of the bandwidth limit, "
        f"peak {facts['allocated_bytes'] / size:,.1f} {unit}"
    )


def _facts(options: BenchmarkOptions, results: list[Result]) -> dict[str, Any]:
    """What was asked for, and on what it was measured: more than one value where cells differ."""
    measured = only_measured(results)
    found = {name: list(dict.fromkeys(r[name] for r in measured)) for name in ("device_name", "threads", "torch")}
    return {
        **machine_facts(),
        "torch": found["torch"],
        "device": found["device_name"],
        "threads": found["threads"],
        "model": str(options.model),
        "adapter": None if options.adapter is None else str(options.adapter),
        "repetitions": options.repetitions or REPETITIONS,
    }
