"""Benchmark tables: one line a cell, techniques nested in lines and columns, and the effect of each technique.

Loads no torch.
"""

from __future__ import annotations

import itertools
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence

from llamatune.benchmarking.effects import HELD_OUT, Effect
from llamatune.benchmarking.grid import switch
from llamatune.benchmarking.results import (
    CATEGORIES,
    Result,
    memory_unit,
    only_measured,
    sample_deviation,
    status_word,
    work_text,
)
from llamatune.formats.text_table import TextTable
from llamatune.spec_grid import Axis, in_words

MEMORY, SPEED = "memory", "speed"
"""The parts of the flat table."""


def flat_table(axes: Sequence[Axis], results: Sequence[Result], parts: Sequence[str] = (MEMORY, SPEED)) -> TextTable:
    """One line a cell, with all columns or a part of them. A column that is empty in every cell is left out.

    The notes are those of these parts; why cells were not measured stands with the memory.
    """
    unit = memory_unit(results)
    measured = only_measured(results)

    def ratio(result: Result, key: str) -> str:
        return f"{result[key] / measured[0][key]:.2f}x"

    columns: dict[str, dict[str, Callable[[Result], str]]] = {
        MEMORY: {
            "peak": lambda r: unit.text(r["allocated_bytes"]),
            "ratio": lambda r: ratio(r, "allocated_bytes"),
            "planned": lambda r: unit.text(r["predicted_bytes"]),
            **{name: lambda r, name=name: unit.text(r["categories"][name]) for name in CATEGORIES},  # type: ignore[misc]
            "reserved": lambda r: unit.text(r["reserved_bytes"]),
            "whole device": lambda r: unit.text(r["device_bytes"]),
            "resident": lambda r: unit.text(r["resident_bytes"]),
        },
        SPEED: {
            "time": _work_seconds,
            "s/step": _step_seconds,
            "tokens/s": _tokens_per_second,
            "speed": lambda r: ratio(r, "tokens_per_second"),
            "loss": lambda r: f"{statistics.fmean(r['losses']):.4f}",
            "held-out loss": _held_out_loss,
        },
    }
    shown = {name: show for part in parts for name, show in columns[part].items()}
    titles = {MEMORY: f"memory ({unit.name})", SPEED: "speed and loss"}
    notes = _notes(results, parts)
    return line_a_cell(", ".join(titles[part] for part in parts), axes, results, shown, notes)


def line_a_cell(
    title: str,
    axes: Sequence[Axis],
    results: Sequence[Result],
    shown: Mapping[str, Callable[[Result], str]],
    notes: Sequence[str],
) -> TextTable:
    """A table of what is ``shown`` of each cell by heading, without columns that are empty in every cell."""
    rows = []
    for result in results:
        texts = [status_word(result), *[""] * (len(shown) - 1)]
        if result["status"] == "measured":
            texts = [show(result) for show in shown.values()]
        rows.append((*result["values"].values(), *texts))
    header = (*(axis.name for axis in axes), *shown)
    used = [place for place in range(len(header)) if place <= len(axes) or any(row[place] for row in rows)]
    head, *body = (tuple(line[place] for place in used) for line in (header, *rows))
    return TextTable(title[0].upper() + title[1:], head, tuple(body), len(axes), tuple(notes))


def _notes(results: Sequence[Result], parts: Sequence[str]) -> list[str]:
    ratios = {MEMORY: "'ratio' (of the peak)", SPEED: "'speed' (of tokens/s)"}
    named = " and ".join(ratios[part] for part in parts)
    notes = [f"{named} {'are' if len(parts) > 1 else 'is'} to the first cell that was measured."]
    if SPEED in parts and (work := work_text(results)) is not None:
        notes.append(
            f"'time' is that of equal work, {work}: their tokens at the measured tokens/s, in seconds. It has no part "
            "of loading, validation and saving."
        )
    if MEMORY not in parts:
        return notes
    if measured := only_measured(results):
        gap = max(abs(r["allocated_bytes"] - sum(r["categories"].values())) / r["allocated_bytes"] for r in measured)
        if gap >= 0.001:
            notes.append(
                f"The categories add up to the peak within {gap:.1%}; the rest is inside kernels and rounding."
            )
        predicted = [r for r in measured if r["predicted_bytes"] is not None]
        if errors := [abs(r["predicted_bytes"] / r["allocated_bytes"] - 1) for r in predicted]:
            notes.append(
                f"'planned' is what plan-memory says of the heaviest rows of the data: at most {max(errors):.1%} from "
                f"the peak, median {statistics.median(errors):.1%}."
            )
    return [*notes, *outcome_notes(results)]


def outcome_notes(results: Sequence[Result]) -> list[str]:
    """Why cells were not measured, a note for each reason."""
    notes = []
    reasons: dict[str, list[str]] = {}
    for result in results:
        if result["status"] != "measured":
            code = f" (exit {result['exit_code']})" if result["status"] == "failed" else ""
            reason = f"{status_word(result)}{code}: {result['reason']}"
            reasons.setdefault(reason, []).append(in_words(result["values"]))
    for reason, cells in reasons.items():
        others = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        notes.append(f"{reason} [{cells[0]}{others}]")
    return notes


def nested_tables(axes: Sequence[Axis], results: Sequence[Result]) -> list[TextTable]:
    """Peak memory, time, speed and loss with OFF and ON nested in lines and columns, as in printed reports.

    The first half of the axes (one more if their number is odd) names the lines, the others the columns.
    """
    split = (len(axes) + 1) // 2
    down, across = axes[:split], axes[split:]
    by_values = {tuple(result["values"].values()): result for result in results}
    unit = memory_unit(results)
    quantities: dict[str, Callable[[Result], str]] = {
        f"Peak memory, {unit.name}": lambda r: unit.text(r["allocated_bytes"]),
        f"Seconds for equal work, {work_text(results)}": _work_seconds,
        "Seconds a step": _step_seconds,
        "Tokens/s": _tokens_per_second,
        "Held-out loss": _held_out_loss,
    }
    lines, columns = (list(itertools.product(*(axis.values for axis in part))) for part in (down, across))
    names = [axis.name for axis in down]
    headings = zip(across, _switches(across, columns), strict=True)
    heads = [(*[""] * (split - 1), axis.name, *switches) for axis, switches in headings]
    labels = list(zip(*_switches(down, lines), strict=True)) or [()]
    tables = []
    for title, show in quantities.items():
        body = []
        for label, line in zip(labels, lines, strict=True):
            cells = [by_values[(*line, *column)] for column in columns]
            body.append((*label, *(show(c) if c["status"] == "measured" else status_word(c) for c in cells)))
        if any(text for row in body for text in row[split:]):
            header = heads[0] if heads else (*names, title)
            inner = [(*names, *("" for _ in columns))] if heads else []
            tables.append(TextTable(title, header, (*heads[1:], *inner, *body), split))
    return tables


def _switches(axes: Sequence[Axis], combinations: Sequence[tuple[str, ...]]) -> list[list[str]]:
    """By axis, the switch of each combination; empty if the one before it has the same values up to this axis."""
    switches = []
    for depth, axis in enumerate(axes):
        paths = [combination[: depth + 1] for combination in combinations]
        repeated = [False, *itertools.starmap(operator.eq, itertools.pairwise(paths))]
        switches.append(["" if again else switch(axis, path[-1]) for again, path in zip(repeated, paths, strict=True)])
    return switches


def effects_table(effects: Sequence[Effect]) -> TextTable:
    """A column a technique, a line a quantity: median (lowest..highest) over the pairs that differ in it alone."""
    header = ("", *(effect.title for effect in effects))
    rows = [("pairs of cells", *(str(len(effect.pairs)) for effect in effects))]
    for quantity in dict.fromkeys(name for effect in effects for name in effect.changes):
        name = "impact on accuracy" if quantity == HELD_OUT else quantity
        rows.append((name, *(_change(effect, quantity) for effect in effects)))
    notes = [
        "Median (lowest..highest) over the pairs of cells that differ in this technique alone. Peak memory, time for "
        "equal work and tokens/s in % of the cell without it; categories in % of that cell's peak, so they add up to "
        "its change. !: some pairs clearly rose and some fell."
    ]
    if any(HELD_OUT in effect.changes for effect in effects):
        notes.append(
            "Impact on accuracy: held-out loss, nats, the mean of the seeds; ± is their sample standard deviation."
        )
    notes += [f"{effect.title}: {sentence}." for effect in effects for sentence in effect.sentences]
    return TextTable("What each technique did here", header, tuple(rows), 1, tuple(notes))


def _change(effect: Effect, quantity: str) -> str:
    if quantity not in effect.changes:
        return ""
    change = effect.changes[quantity]
    digits = 3 if quantity == HELD_OUT else 1 if max(abs(change.lowest), abs(change.highest)) < 99.95 else 0
    low, middle, high = (f"{value:+.{digits}f}" for value in (change.lowest, change.median, change.highest))
    if float(low) == float(high) == 0:
        return "0"
    spread = f" ± {effect.seed_spread:.3f}" if quantity == HELD_OUT and effect.seed_spread is not None else ""
    flag = "!" if change.changes_sign else ""
    return f"{middle}{flag} ({low}..{high}){spread}" if low != high else f"{middle}{spread}"


def _step_seconds(result: Result) -> str:
    return _seconds(result["step_s"])


def _work_seconds(result: Result) -> str:
    return _seconds(result["work_s"]) if "work_s" in result else ""


def _seconds(value: float) -> str:
    return f"{value:,.{3 if value < 10 else 1 if value < 1000 else 0}f}"


def _tokens_per_second(result: Result) -> str:
    return f"{result['tokens_per_second']:,.0f}"


def _held_out_loss(result: Result) -> str:
    losses = result["held_out_losses"]
    spread = sample_deviation(losses)
    return f"{statistics.fmean(losses):.4f}" + ("" if spread is None else f" ± {spread:.4f}") if losses else ""
