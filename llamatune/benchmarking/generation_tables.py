"""The table and the CSV file of a benchmark of generation. Loads no torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from llamatune.benchmarking.results import Result, memory_unit, only_measured
from llamatune.benchmarking.tables import MEMORY, SPEED, line_a_cell, outcome_notes
from llamatune.formats.text_table import TextTable
from llamatune.spec_grid import Axis

_FACTS = (
    "prefill_tokens_per_second", "prefill_deviation", "decode_tokens_per_second", "decode_deviation", "first_token_s",
    "first_token_deviation_s", "bandwidth_fraction", "bandwidth_bytes_per_second", "step_read_bytes", "weights_bytes",
    "cache_bytes", "allocated_bytes", "reserved_bytes", "resident_bytes", "held_in", "device", "device_name", "threads",
    "torch",
)  # fmt: skip


def generation_table(
    axes: Sequence[Axis], results: Sequence[Result], parts: Sequence[str] = (SPEED, MEMORY)
) -> TextTable:
    """One line a cell, with all columns or a part of them; the notes stand with the speed."""
    unit = memory_unit(results)
    columns: dict[str, dict[str, Callable[[Result], str]]] = {
        SPEED: {
            "prefill tokens/s": lambda r: _spread(r["prefill_tokens_per_second"], r["prefill_deviation"]),
            "decode tokens/s": lambda r: _spread(r["decode_tokens_per_second"], r["decode_deviation"]),
            "first token (ms)": lambda r: _spread(r["first_token_s"], r["first_token_deviation_s"], 1000),
            "bandwidth (GB/s)": lambda r: _number(r["bandwidth_bytes_per_second"] / 1e9),
            "of the limit": lambda r: f"{r['bandwidth_fraction']:.{0 if r['bandwidth_fraction'] >= 0.1 else 1}%}",
        },
        MEMORY: {
            "read a step": lambda r: unit.text(r["step_read_bytes"]),
            "weights": lambda r: unit.text(r["weights_bytes"]),
            "keys and values": lambda r: unit.text(r["cache_bytes"]),
            "peak": lambda r: unit.text(r["allocated_bytes"]),
            "reserved": lambda r: unit.text(r["reserved_bytes"]),
            "resident": lambda r: unit.text(r["resident_bytes"]),
        },
    }
    shown = {name: show for part in parts for name, show in columns[part].items()}
    titles = {MEMORY: f"memory ({unit.name})", SPEED: "speed of generation"}
    notes = [*_notes(results), *outcome_notes(results)] if SPEED in parts else []
    return line_a_cell(", ".join(titles[part] for part in parts), axes, results, shown, notes)


def _notes(results: Sequence[Result]) -> list[str]:
    notes = [
        "Medians ± sample standard deviation of the repetitions. Tokens/s are those of all rows together.",
        "'of the limit': decoding, to the speed at which each step reads the weights and the keys and values of all "
        "rows once at the bandwidth that was measured in the cell.",
    ]
    if any(result["bandwidth_fraction"] > 1 for result in only_measured(results)):
        notes.append("Above 100 % of the limit: the weights stay in caches, which are faster than memory.")
    return notes


def _spread(value: float, deviation: float | None, scale: float = 1) -> str:
    if deviation is None:
        return _number(value * scale)
    return f"{_number(value * scale)} ± {_number(deviation * scale)}"


def _number(value: float) -> str:
    """Three digits or more: ``1,234``, ``12.3``, ``1.23``."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def generation_csv(axes: Sequence[Axis], results: Sequence[Result]) -> str:
    """One line a cell, plain numbers: bytes, seconds; empty where nothing was measured."""
    out = io.StringIO()
    columns = [*(axis.key for axis in axes), "status", *_FACTS, "reason"]
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in results:
        writer.writerow({**result["values"], **result})
    return out.getvalue()
