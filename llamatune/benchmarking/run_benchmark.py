"""``run_benchmark``: measures every cell of a grid in a process of its own, then writes tables and chart."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamatune import __version__
from llamatune.benchmarking.bar_chart import draw_chart
from llamatune.benchmarking.cell_plan import PlannedCell, plan_benchmark
from llamatune.benchmarking.cell_process import SCRATCH, run_cell
from llamatune.benchmarking.effects import Effect, effects
from llamatune.benchmarking.grid import Axis
from llamatune.benchmarking.results import Result, memory_unit, results_csv, status_word
from llamatune.benchmarking.tables import effects_table, flat_table, nested_tables
from llamatune.command_options.training import BenchmarkOptions
from llamatune.durable_writing import probe_writable, refuse_occupied, write_atomic
from llamatune.errors import Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.formats.benchmark_cell import read_cell
from llamatune.strict_json import dump_json
from llamatune.training.run_directory import is_occupied, move_aside, refuse_inputs, write_if_changed
from llamatune.training.run_file_names import CELLS
from llamatune.training.run_lock import LOCK, run_lock

_FINAL = ("measured", "oom", "refused")
"""A cell with one of these outcomes is not measured again."""


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
    if not options.overwrite:
        _refuse_other(output)
    grid, planned = plan_benchmark(options, on_event)
    for plan in planned:
        if plan.cell.spec is not None:
            refuse_inputs(plan.cell.spec, "--output", options.overwrite)
    _claim(output, options.overwrite)
    with run_lock(output):
        for stale in output.glob(f"{SCRATCH}*"):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        (output / CELLS).mkdir(exist_ok=True)
        results: list[Result] = []
        for number, plan in enumerate(planned, 1):
            on_event(Progress("cells", number - 1, len(planned)))
            try:
                facts = _outcome(plan, output, should_stop)
            except Stopped:
                done = f"stopped by a signal after {number - 1} of {len(planned)} cells"
                raise Stopped(done, output, "run the same command again to continue") from None
            results.append({"values": dict(plan.cell.values), **facts})
            on_event(Notice(f"cell {number} of {len(planned)}: {plan.cell.label}: {_summary(facts)}"))
        on_event(Progress("cells", len(planned), len(planned)))
        benchmark = Benchmark(grid.axes, results, effects(grid.axes, results), _facts(options, grid.fixed))
        _write(output, benchmark, on_event)
    return benchmark


def _claim(output: Path, overwrite: bool) -> None:
    """Accept an empty directory or one of an earlier benchmark, of any grid; else refuse it or move it aside."""
    if overwrite and is_occupied(output):
        with run_lock(output):
            pass
        move_aside(output)
    else:
        _refuse_other(output)
    probe_writable(output)


def _refuse_other(output: Path) -> None:
    if is_occupied(output) and not ((output / LOCK).is_file() and (output / CELLS).is_dir()):
        refuse_occupied(output, overwrite=False)


def _outcome(plan: PlannedCell, output: Path, should_stop: ShouldStop) -> dict[str, Any]:
    """The cell's outcome from the directory, or by measuring it."""
    if plan.task is None:
        return {"status": "refused", "reason": plan.cell.refusal}
    path = output / CELLS / f"{plan.identity}.json"
    if path.is_file() and (earlier := read_cell(path, len(plan.task.seeds)))["status"] in _FINAL:
        return earlier
    facts = run_cell(plan.task, output, should_stop)
    write_atomic(path, dump_json({"values": plan.cell.values, **facts}))
    return facts


def _summary(facts: dict[str, Any]) -> str:
    if facts["status"] != "measured":
        return f"{status_word(facts)}: {facts['reason']}"
    unit, size = memory_unit([facts])
    return (
        f"peak {facts['allocated_bytes'] / size:,.1f} {unit}, {facts['step_s']:.3f} s a step, "
        f"{facts['tokens_per_second']:,.0f} tokens/s, loss {facts['losses'][0]:.4f}"
    )


def _facts(options: BenchmarkOptions, fixed: tuple[str, ...]) -> dict[str, Any]:
    return {
        "llamatune": __version__,
        "machine": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "spec": str(options.spec_path),
        "overrides": [*fixed, *options.overrides],
        "steps": options.steps if options.epochs is None else None,
        "epochs": options.epochs,
        "seeds": options.seeds,
        "memory_limit_bytes": options.memory_limit_bytes,
    }


def processor_name() -> str:
    """The processor's model, from ``/proc/cpuinfo`` on Linux."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown(benchmark: Benchmark) -> str:
    """The content of ``benchmark.md``: the facts, then every table."""
    known = {name: value for name, value in benchmark.facts.items() if value not in (None, [])}
    texts = {name: ", ".join(map(str, x)) if isinstance(x, list | tuple) else x for name, x in known.items()}
    facts = "\n".join(f"- {name}: {text}" for name, text in texts.items())
    tables = [flat_table(benchmark.axes, benchmark.results)]
    if benchmark.effects:
        tables.append(effects_table(benchmark.effects))
    tables += nested_tables(benchmark.axes, benchmark.results)
    return f"# Benchmark\n\n{facts}\n\n" + "\n".join(table.markdown() for table in tables)


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
