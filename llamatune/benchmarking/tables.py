"""The results as tables: one line a cell, nested as reports print it, and what each technique did. Loads no torch."""

from __future__ import annotations

import csv
import io
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llamatune.benchmarking.effects import HELD_OUT, Effect, Result, sample_deviation
from llamatune.benchmarking.grid import Axis, in_words

MEMORY, SPEED = "memory", "speed"
"""The parts of the flat table."""
_MEMORY_FACTS = ("allocated_bytes", "predicted_bytes", "reserved_bytes", "device_bytes", "resident_bytes")
_FACTS = ("step_s", "tokens_per_second", "runtime_s", "steps", "warm_up_steps", "skipped_windows", "tokens",
          "unattributed_bytes", "trainable_parameters", "total_parameters", "device", "device_name", "threads",
          "torch")  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Text in cells; the first ``labels`` columns name the line. ``notes`` stand below."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        align = ["---"] * self.labels + ["---:"] * (len(self.header) - self.labels)
        lines = [[cell.replace("|", "\\|") for cell in row] for row in (self.header, tuple(align), *self.rows)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"## {self.title}\n\n{text}\n" + "".join(f"\n- {note}" for note in self.notes) + "\n" * bool(self.notes)


def word_for(result: Result) -> str:
    """What stands in the place of the numbers of a cell that has none."""
    return "OOM" if result["status"] == "oom" else str(result["status"])


def first_measured(results: Sequence[Result]) -> Result | None:
    """The cell that ratios are taken to."""
    return next((result for result in results if result["status"] == "measured"), None)


def flat_table(axes: Sequence[Axis], results: Sequence[Result], parts: Sequence[str] = (MEMORY, SPEED)) -> Table:
    """One line a cell, all columns or a part of them. One that no cell has anything to say in is left out."""
    unit, size = memory_unit(results)
    base = first_measured(results)

    def sized(value: float | None) -> str:
        return "" if value is None else f"{value / size:,.{2 if unit == 'GiB' else 1}f}"

    def ratio(key: str) -> Callable[[Result], str]:
        return lambda result: "" if base is None else f"{result[key] / base[key]:.2f}x"

    columns: dict[str, dict[str, Callable[[Result], str]]] = {
        MEMORY: {
            "peak": lambda r: sized(r["allocated_bytes"]),
            "ratio": ratio("allocated_bytes"),
            "planned": lambda r: sized(r["predicted_bytes"]),
            "parameters": lambda r: sized(r["categories"]["parameters"]),
            "gradients": lambda r: sized(r["categories"]["gradients"]),
            "optimizer": lambda r: sized(r["categories"]["optimizer"]),
            "activations": lambda r: sized(r["categories"]["activations"]),
            "casts": lambda r: sized(r["categories"]["casts"]),
            "temporary": lambda r: sized(r["categories"]["temporary"]),
            "reserved": lambda r: sized(r["reserved_bytes"]),
            "whole device": lambda r: sized(r["device_bytes"]),
            "resident": lambda r: sized(r["resident_bytes"]),
        },
        SPEED: {
            "s/step": lambda r: _seconds(r["step_s"]),
            "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
            "speed": ratio("tokens_per_second"),
            "loss": lambda r: f"{statistics.fmean(r['losses']):.4f}",
            "held-out loss": _held_out,
        },
    }
    shown = {name: show for part in parts for name, show in columns[part].items()}
    rows = []
    for result in results:
        measured = result["status"] == "measured"
        texts = [show(result) for show in shown.values()] if measured else [word_for(result), *[""] * (len(shown) - 1)]
        rows.append((*result["values"].values(), *texts))
    header = (*(axis.name for axis in axes), *shown)
    used = [place for place in range(len(header)) if place <= len(axes) or any(row[place] for row in rows)]
    return Table(
        _title(parts, unit),
        tuple(header[place] for place in used),
        tuple(tuple(row[place] for place in used) for row in rows),
        len(axes),
        tuple(_notes(results)),
    )


def _title(parts: Sequence[str], unit: str) -> str:
    titles = {MEMORY: f"Memory ({unit})", SPEED: "Speed and loss"}
    return ", ".join(titles[part] if place == 0 else titles[part].lower() for place, part in enumerate(parts))


def _notes(results: Sequence[Result]) -> list[str]:
    notes = ["'ratio' (of the peak) and 'speed' (of tokens/s) are to the first cell that was measured."]
    if (gap := _largest_gap(results)) >= 0.001:
        notes.append(f"The categories add up to the peak within {gap:.1%}; the rest is inside kernels and rounding.")
    notes += _prediction(results)
    reasons: dict[str, list[str]] = {}
    for result in results:
        if result["status"] != "measured":
            code = f" (exit {result['exit_code']})" if result["status"] == "failed" else ""
            word = word_for(result)
            named = in_words(result["values"])
            reasons.setdefault(f"{word}{code}: {result['reason']}", []).append(named)
    for reason, cells in reasons.items():
        others = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
        notes.append(f"{reason} [{cells[0]}{others}]")
    return notes


def _prediction(results: Sequence[Result]) -> list[str]:
    apart = [abs(r["predicted_bytes"] / r["allocated_bytes"] - 1) for r in results if r["status"] == "measured"]
    if not apart:
        return []
    return [
        f"'planned' is what plan-memory says of the heaviest rows of the data: at most {max(apart):.1%} from the peak, "
        f"median {statistics.median(apart):.1%}."
    ]


def _largest_gap(results: Sequence[Result]) -> float:
    gaps = [
        abs(result["allocated_bytes"] - sum(result["categories"].values())) / result["allocated_bytes"]
        for result in results
        if result["status"] == "measured"
    ]
    return max(gaps, default=0.0)


def nested_tables(axes: Sequence[Axis], results: Sequence[Result]) -> list[Table]:
    """Peak memory, time and speed with OFF and ON nested in lines and columns, as reports print them.

    The first half of the axes (one more where they are odd) names the lines, the others the columns.
    """
    split = (len(axes) + 1) // 2
    down, across = axes[:split], axes[split:]
    by_values = {tuple(result["values"].values()): result for result in results}
    unit, size = memory_unit(results)
    quantities: dict[str, Callable[[Result], str]] = {
        f"Peak memory, {unit}": lambda r: f"{r['allocated_bytes'] / size:,.{2 if unit == 'GiB' else 1}f}",
        "Seconds a step": lambda r: _seconds(r["step_s"]),
        "Tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
        "Held-out loss": _held_out,
    }
    columns = list(itertools.product(*(axis.values for axis in across)))
    names = [axis.name for axis in down]
    heads = [
        [axis.name if place == split - 1 else "" for place in range(split)]
        + _once([(*column[:depth], axis.switch(column[depth])) for column in columns])
        for depth, axis in enumerate(across)
    ]
    tables = []
    for title, show in quantities.items():
        body = []
        before: tuple[str, ...] = ()
        for line in itertools.product(*(axis.values for axis in down)):
            shown = [axis.switch(value) for axis, value in zip(down, line, strict=True)]
            same = next((n for n, (a, b) in enumerate(zip(line, before, strict=False)) if a != b), 0)
            labels = ["" if place < same else text for place, text in enumerate(shown)]
            cells = [by_values[(*line, *column)] for column in columns]
            texts = [show(c) if c["status"] == "measured" else word_for(c) for c in cells]
            body.append((*labels, *texts))
            before = line
        if any(text for row in body for text in row[split:]):
            header = tuple(heads[0]) if heads else (*names, title)
            lower = [tuple(head) for head in heads[1:]]
            inner = [(*names, *("" for _ in columns))] if heads else []
            tables.append(Table(title, header, (*lower, *inner, *body), split))
    return tables


def _once(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The last name of each path, where it is not the one to the left's."""
    return [path[-1] if n == 0 or path != paths[n - 1] else "" for n, path in enumerate(paths)]


def effects_table(found: Sequence[Effect]) -> Table:
    """A column a technique, a line a quantity: median (lowest..highest) over the pairs that differ in it alone."""
    header = ("", *(effect.title for effect in found))
    rows = [("pairs of cells", *(str(len(effect.pairs)) for effect in found))]
    for quantity in dict.fromkeys(name for effect in found for name in effect.changes):
        name = "impact on accuracy" if quantity == HELD_OUT else quantity.replace("_", " ")
        rows.append((name, *(_change(effect, quantity) for effect in found)))
    rows = [row for row in rows if any(text != "" for text in row[1:])]
    notes = [
        "Median (lowest..highest) over the pairs of cells that differ in this technique alone. Peak memory, step "
        "time and tokens/s in % of the cell without it; categories in % of that cell's peak, so they add up to its "
        "change. !: some pairs clearly rose and some fell."
    ]
    if any(HELD_OUT in effect.changes for effect in found):
        notes.append(
            "Impact on accuracy: held-out loss, nats, the mean of the seeds; ± is their sample standard deviation."
        )
    notes += [f"{effect.title}: {sentence}." for effect in found for sentence in effect.sentences]
    return Table("What each technique did here", header, tuple(rows), 1, tuple(notes))


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


def results_csv(axes: Sequence[Axis], results: Sequence[Result]) -> str:
    """One line a cell, plain numbers: bytes, seconds; empty where nothing was measured."""
    measured = first_measured(results)
    categories = () if measured is None else tuple(measured["categories"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [*(axis.key for axis in axes), "status", *_MEMORY_FACTS, *(f"{name}_bytes" for name in categories), *_FACTS,
         "loss", "held_out_loss", "held_out_loss_spread", "reason"]
    )  # fmt: skip
    for result in results:
        row = [*result["values"].values(), result["status"]]
        if result["status"] == "measured":
            row += [result[name] for name in _MEMORY_FACTS]
            row += [result["categories"][name] for name in categories]
            row += [result[name] for name in _FACTS]
            held_out = result["held_out_losses"]
            row += [statistics.fmean(result["losses"]), statistics.fmean(held_out) if held_out else None]
            row += [sample_deviation(result["held_out_losses"]), None]
        else:
            row += [None] * (len(_MEMORY_FACTS) + len(categories) + len(_FACTS) + 3) + [result["reason"]]
        writer.writerow(row)
    return out.getvalue()


def memory_unit(results: Sequence[Result]) -> tuple[str, int]:
    """What all memory is told in, and its bytes."""
    largest = max((result["allocated_bytes"] for result in results if result["status"] == "measured"), default=0)
    return ("GiB", 1 << 30) if largest >= 1 << 32 else ("MiB", 1 << 20)


def _seconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _held_out(result: Result) -> str:
    if not result["held_out_losses"]:
        return ""
    spread = sample_deviation(result["held_out_losses"])
    return f"{statistics.fmean(result['held_out_losses']):.4f}" + ("" if spread is None else f" ± {spread:.4f}")
