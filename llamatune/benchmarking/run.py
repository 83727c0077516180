"""The benchmark: every cell of a grid in a process of its own, then the tables and the chart."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamatune import __version__
from llamatune.benchmarking.cell import SCRATCH, run_cell
from llamatune.benchmarking.chart import draw_chart
from llamatune.benchmarking.effects import Effect, Result, effects
from llamatune.benchmarking.grid import Axis
from llamatune.benchmarking.plan import PlannedCell, plan_benchmark
from llamatune.benchmarking.tables import (
    effects_table,
    flat_table,
    memory_unit,
    nested_tables,
    results_csv,
    word_for,
)
from llamatune.durable_writing import probe_writable, refuse_occupied, write_atomic
from llamatune.errors import Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.options.training import BenchmarkOptions
from llamatune.strict_json import dump_json, read_json
from llamatune.training.run_directory import is_ours, move_aside, write_if_changed
from llamatune.training.run_lock import run_lock

_CELLS = "cells"
_FINAL = ("measured", "oom", "refused")
"""What a cell can come to that measuring it again would only repeat."""


@dataclass(frozen=True)
class Benchmark:
    """What was measured, in the grid's order; ``facts`` say by what and on what."""

    axes: tuple[Axis, ...]
    results: list[Result]
    effects: list[Effect]
    facts: dict[str, Any]

    def payload(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {
            **self.facts,
            "axes": [asdict(axis) for axis in self.axes],
            "cells": list(self.results),
            "effects": [{"title": effect.title, **asdict(effect)} for effect in self.effects],
        }


def run_benchmark(
    options: BenchmarkOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> Benchmark:
    """Measure what the output directory does not hold yet, and write ``benchmark.{json,csv,md,png,svg}`` there.

    Raises:
        LlamatuneError: no cell can be begun, or the output directory cannot be used.
        Stopped: ``should_stop`` said so; measured cells are kept, and the same call goes on.
    """
    grid, planned = plan_benchmark(options, on_event)
    output = Path(os.path.realpath(options.output))
    _claim(output, options.overwrite)
    with run_lock(output):
        for left_by_a_kill in output.glob(f"{SCRATCH}*"):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
        (output / _CELLS).mkdir(exist_ok=True)
        results: list[Result] = []
        for number, plan in enumerate(planned, 1):
            on_event(Progress("cells", number - 1, len(planned)))
            try:
                facts = _outcome(plan, output, should_stop)
            except Stopped:
                done = f"stopped by a signal after {number - 1} of {len(planned)} cells"
                raise Stopped(done, output, "run the same command again to continue") from None
            results.append({"values": dict(plan.cell.values), **facts})
            on_event(Notice(f"cell {number} of {len(planned)}: {plan.cell.label}: {_in_words(facts)}"))
        on_event(Progress("cells", len(planned), len(planned)))
        benchmark = Benchmark(grid.axes, results, effects(grid.axes, results), _facts(options, grid.fixed))
        _write(output, benchmark, on_event)
    return benchmark


def _claim(output: Path, overwrite: bool) -> None:
    """A directory of an earlier benchmark is gone on with, whatever its grid was; cells are known by what they are."""
    others = output.is_dir() and any(not is_ours(entry) for entry in output.iterdir())
    if others and overwrite:
        with run_lock(output):
            pass
        move_aside(output)
    elif others and not (output / _CELLS).is_dir():
        refuse_occupied(output, overwrite=False)
    probe_writable(output)


def _outcome(plan: PlannedCell, output: Path, should_stop: ShouldStop) -> dict[str, Any]:
    """What the directory knows of the cell, else what measuring it comes to."""
    if plan.task is None:
        return {"status": "refused", "reason": plan.refusal}
    path = output / _CELLS / f"{plan.identity}.json"
    if path.is_file():
        known = read_json(path)
        if known["status"] in _FINAL:
            del known["values"]
            return known
    facts = run_cell(plan.task, output, should_stop)
    write_atomic(path, dump_json({"values": plan.cell.values, **facts}))
    return facts


def _in_words(facts: dict[str, Any]) -> str:
    if facts["status"] != "measured":
        return f"{word_for(facts)}: {facts['reason']}"
    unit, size = memory_unit([facts])
    return (
        f"peak {facts['allocated_bytes'] / size:,.1f} {unit}, {facts['step_s']:.3f} s a step, "
        f"{facts['tokens_per_second']:,.0f} tokens/s, loss {facts['losses'][0]:.4f}"
    )


def _facts(options: BenchmarkOptions, fixed: tuple[str, ...]) -> dict[str, Any]:
    return {
        "llamatune": __version__,
        "machine": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "spec": str(options.spec_path),
        "overrides": [*fixed, *options.overrides],
        "steps": options.steps if options.epochs is None else None,
        "epochs": options.epochs,
        "seeds": options.seeds,
        "memory_limit_bytes": options.memory_limit_bytes,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown(benchmark: Benchmark) -> str:
    """Every table, under what was measured."""
    told = {name: value for name, value in benchmark.facts.items() if value not in (None, [])}
    lines = [(name, ", ".join(map(str, v)) if isinstance(v, list | tuple) else v) for name, v in told.items()]
    facts = "\n".join(f"- {name}: {value}" for name, value in lines)
    tables = [flat_table(benchmark.axes, benchmark.results)]
    if benchmark.effects:
        tables.append(effects_table(benchmark.effects))
    tables += nested_tables(benchmark.axes, benchmark.results)
    return f"# Benchmark\n\n{facts}\n\n" + "\n".join(table.markdown() for table in tables)


def _write(output: Path, benchmark: Benchmark, on_event: OnEvent) -> None:
    products = {
        "json": dump_json(benchmark.payload()),
        "csv": results_csv(benchmark.axes, benchmark.results).encode(),
        "md": markdown(benchmark).encode(),
    }
    try:
        products |= draw_chart(benchmark.axes, benchmark.results)
    except ImportError:
        on_event(Notice("no chart without matplotlib: pip install matplotlib"))
    for kind, content in products.items():
        write_if_changed(output / f"benchmark.{kind}", content)
