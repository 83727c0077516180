"""Runs the cells of a benchmark, each in a subprocess, and reads those that its directory holds already."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamatune import __version__
from llamatune.benchmarking.cell_process import SCRATCH, CellTask, run_cell
from llamatune.benchmarking.results import Result, Work, status_word
from llamatune.durable_writing import write_atomic
from llamatune.errors import Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop
from llamatune.formats.benchmark_cell import read_cell
from llamatune.processor import core_count, processor_name
from llamatune.spec_grid import Cell
from llamatune.strict_json import dump_json
from llamatune.training.run_collection import claimed
from llamatune.training.run_file_names import CELLS

_FINAL = ("measured", "oom", "refused")
"""A cell with one of these outcomes is not measured again."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell and its task, None if it is refused; ``identity`` digests all that decides the outcome.

    ``seeds``: how many runs of training there are, each with losses of its own; ``work``: what all cells' times are
    given for. None: nothing is trained.
    """

    cell: Cell
    task: CellTask | None = None
    identity: str = ""
    seeds: int | None = None
    work: Work | None = None


@contextlib.contextmanager
def claimed_cells(output: Path, overwrite: bool) -> Iterator[None]:
    """Hold the directory of a benchmark, which is made, or with ``overwrite`` made anew."""
    with claimed(output, CELLS, overwrite):
        for stale in output.glob(f"{SCRATCH}*"):  # of a process that was killed
            shutil.rmtree(stale, ignore_errors=True)
        yield


def measure_cells(
    planned: Sequence[PlannedCell],
    output: Path,
    summary: Callable[[Result], str],
    on_event: OnEvent,
    should_stop: ShouldStop,
) -> list[Result]:
    """The results in the order of the cells; ``summary`` tells one that was measured in a line.

    Raises:
        Stopped: ``should_stop`` returned True; measured cells are kept.
    """
    results: list[Result] = []
    for number, plan in enumerate(planned, 1):
        on_event(Progress("cells", number - 1, len(planned)))
        try:
            facts = _outcome(plan, output, should_stop)
        except Stopped:
            done = f"stopped by a signal after {number - 1} of {len(planned)} cells"
            raise Stopped(done, output, "run the same command again to continue") from None
        if plan.work is not None and facts["status"] == "measured":
            facts = {**facts, **plan.work.facts(facts["tokens_per_second"])}
        results.append({"values": dict(plan.cell.values), **facts})
        told = summary(facts) if facts["status"] == "measured" else f"{status_word(facts)}: {facts['reason']}"
        on_event(Notice(f"cell {number} of {len(planned)}: {plan.cell.label}: {told}"))
    on_event(Progress("cells", len(planned), len(planned)))
    return results


def _outcome(plan: PlannedCell, output: Path, should_stop: ShouldStop) -> dict[str, Any]:
    """The cell's outcome from the directory, or by measuring it."""
    if plan.task is None:
        return {"status": "refused", "reason": plan.cell.refusal}
    path = output / CELLS / f"{plan.identity}.json"
    if path.is_file() and (earlier := read_cell(path, plan.seeds))["status"] in _FINAL:
        return earlier
    facts = run_cell(plan.task, output, should_stop)
    write_atomic(path, dump_json({"values": plan.cell.values, **facts}))
    return facts


def machine_facts() -> dict[str, Any]:
    """The version and the machine, as every benchmark's facts begin."""
    return {"llamatune": __version__, "machine": processor_name(), "cores": core_count()}


def facts_in_lines(facts: dict[str, Any]) -> str:
    """The facts that are known, a Markdown item each."""
    known = {name: value for name, value in facts.items() if value not in (None, [])}
    texts = {name: ", ".join(map(str, x)) if isinstance(x, list | tuple) else x for name, x in known.items()}
    return "\n".join(f"- {name}: {text}" for name, text in texts.items())
