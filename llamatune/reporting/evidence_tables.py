"""Tables of what was measured beside the runs: ``evaluate`` (loss, GSM8K accuracy) and ``benchmark``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamatune.benchmarking.effects import effects
from llamatune.benchmarking.generation_tables import generation_table
from llamatune.benchmarking.results import Result
from llamatune.benchmarking.tables import MEMORY, SPEED, effects_table, flat_table, nested_tables
from llamatune.errors import CheckpointError, printable
from llamatune.formats.benchmark_json import read_benchmark
from llamatune.formats.evaluation_json import read_evaluation
from llamatune.formats.text_table import TextTable
from llamatune.spec_grid import Axis
from llamatune.units import perplexity_text

_percent = "{:.1%}".format
_MEASURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "loss": ("loss, nats a token", "{:.4f}".format),
    "perplexity": ("perplexity", lambda value: perplexity_text(value, 4)),
    "token_accuracy": ("token accuracy", _percent),
    "correct": ("right answers", "{:,}".format),
    "accuracy": ("accuracy", _percent),
    "accuracy_interval": ("95 % interval", lambda bounds: " to ".join(map(_percent, bounds))),
    "invalid": ("answers without a number", "{:,}".format),
    "unfinished": ("answers cut at the limit", "{:,}".format),
}
"""Figures of ``evaluate``: how each is called and written."""


def stored_evaluation_table(path: Path, name: str) -> TextTable:
    """``evaluation_table`` of what ``evaluate --json`` printed into a file.

    Raises:
        DataError: it is none.
    """
    return replace(evaluation_table(read_evaluation(path)), name=name)


def evaluation_table(values: Mapping[str, Any]) -> TextTable:
    """A line a measure, a column a model, of the result of ``evaluate``; what tuning changed stands below."""
    compared = any(key.startswith("base_") for key in values)
    columns = {"base": "base_", "tuned": ""} if compared else {"model": ""}
    rows = []
    for key, (label, text) in _MEASURES.items():
        if key in values:
            found = [values.get(f"{prefix}{key}") for prefix in columns.values()]
            rows.append((label, *("" if value is None else text(value) for value in found)))
    return TextTable(_title(values), ("", *columns), tuple(rows), notes=tuple(_changes(values)))


def _title(values: Mapping[str, Any]) -> str:
    data = printable(values["data"])
    if "task" in values:
        return f"GSM8K: {values['questions']:,} questions of {data}, {values['shots']} shots, {values['dtype']}"
    tokens = f"{values['target_tokens']:,} target tokens"
    return f"Loss on {values['rows']:,} {printable(values['split'])} rows of {data}: {tokens}, {values['dtype']}"


def _changes(values: Mapping[str, Any]) -> list[str]:
    """What tuning changed, in sentences."""
    notes = []
    if "loss_difference" in values:
        bounds = values.get("loss_difference_interval")
        sure = "" if bounds is None else f" (95 %: {bounds[0]:+.4f} to {bounds[1]:+.4f})"
        notes.append(f"Tuning changed the loss by {values['loss_difference']:+.4f}{sure}.")
    if "improved_rows" in values:
        notes.append(f"It made the loss smaller in {values['improved_rows']:,} of {values['rows']:,} rows.")
    if {"gained", "lost"} <= values.keys():
        p_value = f"; p = {values['p_value']:.3g} (McNemar's exact test)" if "p_value" in values else ""
        notes.append(f"Tuning gained {values['gained']:,} answers and lost {values['lost']:,}{p_value}.")
    return notes


def benchmark_tables(directory: Path, name: str) -> list[TextTable]:
    """The tables of a ``benchmark`` directory: memory, speed, effects of techniques, nested.

    Raises:
        CheckpointError: it is none, or its file is broken.
    """
    stored = read_benchmark(directory)
    axes, results = tuple(Axis(axis.key, tuple(axis.values)) for axis in stored.axes), stored.cells
    try:
        tables = _tables(axes, results, stored.of_generation)
    except (ValueError, TypeError, KeyError, IndexError):  # each value is one of its kind, and together they are none
        raise CheckpointError("its cells do not fit each other", directory, "measure them again") from None
    return [
        replace(
            table,
            title=printable(table.title),
            header=_shown(table.header),
            rows=tuple(map(_shown, table.rows)),
            notes=_shown(table.notes),
            name=f"{name}-{place}",
        )
        for place, table in enumerate(tables, 1)
    ]


def _tables(axes: Sequence[Axis], results: Sequence[Result], of_generation: bool) -> list[TextTable]:
    if of_generation:
        return [generation_table(axes, results, [part]) for part in (SPEED, MEMORY)]
    tables = [flat_table(axes, results, [part]) for part in (MEMORY, SPEED)]
    if found := effects(axes, results):
        tables.append(effects_table(found))
    return [*tables, *(nested_tables(axes, results) if len(results) == _cells(axes) else ())]


def _cells(axes: Sequence[Axis]) -> int:
    """Of a whole grid."""
    count = 1
    for axis in axes:
        count *= len(axis.values)
    return count


def _shown(texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(map(printable, texts))
