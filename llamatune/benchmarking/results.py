"""Results of benchmark cells: what a result holds, memory categories, the unit of memory, and the CSV file.

Loads no torch.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from llamatune.formats.benchmark_cell import Categories
from llamatune.spec_grid import Axis

CATEGORIES = tuple(Categories.model_fields)
"""The memory categories. Each storage is in one of them, decided by its whole life.

``parameters`` are the base, the adapter and buffers. ``gradients`` are the storages that were the ``.grad`` of a
trained tensor when a backward pass ended. ``optimizer`` is its state. ``activations`` were made in a forward pass, or
in a recomputation, and were still alive when the backward pass continued. ``casts`` are copies of parameters in another
dtype, which autocast and autograd may keep. ``temporary`` is the rest, including the token ids of the batch.
"""
Result = Mapping[str, Any]
"""A cell: ``values`` by axis key, ``status``, and what was measured, or the ``reason`` why not."""

_MEMORY_FACTS = ("allocated_bytes", "predicted_bytes", "reserved_bytes", "device_bytes", "resident_bytes")
_FACTS = ("work_s", "step_s", "tokens_per_second", "runtime_s", "steps", "warm_up_steps", "skipped_windows", "tokens",
          "unattributed_bytes", "trainable_parameters", "total_parameters", "device", "device_name", "threads",
          "torch")  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Work that is the same in every cell: ``rows`` rows, ``epochs`` times; ``tokens`` are those of the cell's data."""

    rows: int
    epochs: float
    tokens: int

    def facts(self, tokens_per_second: float) -> dict[str, Any]:
        """For a result: the work, and the seconds that its updates take."""
        return {"work": {"rows": self.rows, "epochs": self.epochs}, "work_s": self.tokens / tokens_per_second}


def work_text(results: Sequence[Result]) -> str | None:
    """``200 rows x 5 epochs``, the work that the results have a time for; None: they have none."""
    works = [result["work"] for result in only_measured(results) if "work" in result]
    if not works:
        return None
    epochs = works[0]["epochs"]
    return f"{works[0]['rows']:,} rows x {epochs:g} epoch{'s' * (epochs != 1)}"


def status_word(result: Result) -> str:
    """The word that replaces the numbers of a cell that was not measured."""
    return "OOM" if result["status"] == "oom" else str(result["status"])


def only_measured(results: Sequence[Result]) -> list[Result]:
    """The measured cells; ratios are relative to the first of them."""
    return [result for result in results if result["status"] == "measured"]


class MemoryUnit(NamedTuple):
    """The unit of all memory in a table, and its size in bytes."""

    name: str
    size: int

    def text(self, value_bytes: float | None) -> str:
        """``1,234.5`` (MiB) or ``1.23`` (GiB); empty for None."""
        return "" if value_bytes is None else f"{value_bytes / self.size:,.{2 if self.name == 'GiB' else 1}f}"


def memory_unit(results: Sequence[Result]) -> MemoryUnit:
    """GiB if the largest peak has at least four, else MiB."""
    largest = max((result["allocated_bytes"] for result in only_measured(results)), default=0)
    return MemoryUnit("GiB", 1 << 30) if largest >= 1 << 32 else MemoryUnit("MiB", 1 << 20)


def sample_deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def results_csv(axes: Sequence[Axis], results: Sequence[Result]) -> str:
    """One line a cell, plain numbers: bytes, seconds; empty where nothing was measured."""
    categories = [f"{name}_bytes" for name in CATEGORIES] if only_measured(results) else []
    columns = [axis.key for axis in axes]
    columns += ["status", *_MEMORY_FACTS, *categories, *_FACTS]
    columns += ["loss", "held_out_loss", "held_out_loss_spread", "reason"]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in results:
        row = {**result["values"], **result}
        if result["status"] == "measured":
            held_out = result["held_out_losses"]
            row |= {f"{name}_bytes": size for name, size in result["categories"].items()}
            row["loss"] = statistics.fmean(result["losses"])
            row["held_out_loss"] = statistics.fmean(held_out) if held_out else None
            row["held_out_loss_spread"] = sample_deviation(held_out)
        writer.writerow(row)
    return out.getvalue()
