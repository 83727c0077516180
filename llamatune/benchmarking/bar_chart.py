"""The benchmark's bar chart as PNG and SVG: peak memory by category, and speed, for each cell."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from llamatune.benchmarking.results import CATEGORIES, Result, memory_unit, status_word
from llamatune.spec_grid import Axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = dict(zip(CATEGORIES, ("#4e79a7", "#f28e2b", "#b07aa1", "#59a14f", "#e15759", "#bab0ac"), strict=True))
_SPEED_COLOUR = "#6b7b8c"


def draw_chart(axes: Sequence[Axis], results: Sequence[Result]) -> Mapping[str, bytes]:
    """The chart as ``png`` and ``svg``; equal results give equal bytes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "llamatune", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(11, 1.6 + 0.24 * len(results)), layout="constrained")
        _draw(figure, axes, results)
        pictures = {}
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
            pictures[kind] = buffer.getvalue()
    return pictures


def _draw(figure: Figure, axes: Sequence[Axis], results: Sequence[Result]) -> None:
    memory, speed = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    unit, size = memory_unit(results)
    places = range(len(results))
    for place, result in zip(places, results, strict=True):
        if result["status"] != "measured":
            memory.text(0, place, f" {status_word(result)}", va="center", color="#c03028", weight="bold")
            continue
        left = 0.0
        for category, value in result["categories"].items():
            memory.barh(place, value / size, left=left, color=_COLOURS[category], height=0.72)
            left += value / size
        peak = result["allocated_bytes"] / size
        memory.text(max(left, peak), place, f" {peak:,.{1 if peak < 1000 else 0}f}", va="center")
        speed.barh(place, result["tokens_per_second"], color=_SPEED_COLOUR, height=0.72)
        speed.text(result["tokens_per_second"], place, f" {result['tokens_per_second']:,.0f}", va="center")
    names = [axis.name for axis in axes]
    widths = [max(map(len, (name, *axis.values))) for name, axis in zip(names, axes, strict=True)]
    labels = [_in_columns(result["values"].values(), widths) for result in results]
    memory.set_yticks(places, labels, family="monospace", fontsize=7)
    memory.set_ylim(len(results) - 0.5, -0.5)
    memory.annotate(
        _in_columns(names, widths), (0, 1), (-6.5, 4), "axes fraction", "offset points",
        ha="right", family="monospace", fontsize=7, weight="bold",
    )  # fmt: skip
    memory.set_xlabel(f"peak memory, {unit}")
    speed.set_xlabel("tokens/s")
    for axis in (memory, speed):
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        _separate_groups(axis, results)
    patches = [memory.barh(0, 0, color=colour, label=name) for name, colour in _COLOURS.items()]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches), frameon=False)


def _in_columns(words: Iterable[str], widths: Iterable[int]) -> str:
    return "  ".join(word.ljust(width) for word, width in zip(words, widths, strict=True))


def _separate_groups(axis: Axes, results: Sequence[Result]) -> None:
    """Draw a line where any axis but the last changes, a darker one where the first does."""
    groups = [tuple(result["values"].values())[:-1] for result in results]
    for place in range(1, len(groups)):
        if groups[place] != groups[place - 1]:
            first = groups[place][0] != groups[place - 1][0]
            axis.axhline(place - 0.5, color="#888888" if first else "#dddddd", linewidth=0.6, zorder=0)
