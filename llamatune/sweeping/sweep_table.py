"""The table of a sweep: a line a run, the best one marked. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llamatune.formats.markdown import table
from llamatune.spec_grid import Axis
from llamatune.units import duration, gibibytes

Result = Mapping[str, Any]
_ABSENT = "-"
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "steps": ("steps", "{:,}".format),
    "train_loss": ("training loss", "{:.4f}".format),
    "start_eval_loss": ("validation before", "{:.4f}".format),
    "best_eval_loss": ("lowest validation", "{:.4f}".format),
    "best_step": ("at step", "{:,}".format),
    "trainable_parameters": ("trained", "{:,}".format),
    "peak_memory_bytes": ("peak memory", gibibytes),
    "runtime_s": ("runtime", duration),
}


def best_of(runs: Sequence[Result]) -> str | None:
    """The name of the run with the lowest validation loss, or without one with the lowest training loss."""
    trained = [run for run in runs if run["steps"] is not None]
    measure = "best_eval_loss" if any(run["best_eval_loss"] is not None for run in trained) else "train_loss"
    measured = [run for run in trained if run[measure] is not None]
    return min(measured, key=lambda run: run[measure])["name"] if measured else None


def header_and_rows(
    axes: Sequence[Axis], runs: Sequence[Result], best: str | None
) -> tuple[list[str], list[list[str]]]:
    """The values of the axes, the status and the figures that any run has; ``*`` marks the best run."""
    shown = [key for key in _COLUMNS if any(run[key] is not None for run in runs)]
    header = [*(axis.name for axis in axes), "status", *(_COLUMNS[key][0] for key in shown)]
    rows = []
    for run in runs:
        figures = [_ABSENT if run[key] is None else _COLUMNS[key][1](run[key]) for key in shown]
        mark = f"{run['status']} *" if run["name"] == best else run["status"]
        rows.append([*(run["values"][axis.key] for axis in axes), mark, *figures])
    return header, rows


def notes(runs: Sequence[Result], best: str | None) -> list[str]:
    """What the table leaves open: which run is best, and why others have no figures."""
    told = [f"* {best} has the lowest loss"] if best is not None else []
    return told + [f"{run['name']}: {run['reason']}" for run in runs if run["reason"] is not None]


def markdown(axes: Sequence[Axis], runs: Sequence[Result], best: str | None) -> str:
    """The content of ``sweep.md``."""
    lines = "".join(f"- {note.lstrip('* ')}\n" for note in notes(runs, best))
    return f"# Sweep\n\n{table(*header_and_rows(axes, runs, best))}\n\n{lines}"
