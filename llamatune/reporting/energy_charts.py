"""The charts of ``extract-lora``: how much of each layer's change an adapter holds, by its rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llamatune.checkpoints.extraction import ExtractedMatrix, ExtractReport
from llamatune.reporting.chart_images import PALETTE, Chart, charts_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = [light for name, (light, _) in PALETTE.items() if name.startswith("series")]
_LINES = ("-", "--", ":")


def by_layer(report: ExtractReport) -> dict[int, dict[int, float]]:
    """The share of each layer's squared change that an update of each rank holds: by rank, then by layer."""
    return {rank: _shares(report, rank, lambda name: int(name.split(".")[2])) for rank in _ranks(report)}


def by_module(report: ExtractReport) -> dict[int, dict[str, float]]:
    """The same by rank, then by module, over all layers."""
    return {rank: _shares(report, rank, lambda name: name.split(".")[-2]) for rank in _ranks(report)}


def _ranks(report: ExtractReport) -> list[int]:
    return sorted(report.matrices[0].energy)


def _shares(report: ExtractReport, rank: int, group_of: Any) -> dict[Any, float]:
    groups: dict[Any, list[ExtractedMatrix]] = {}
    for matrix in report.matrices:
        groups.setdefault(group_of(matrix.name), []).append(matrix)
    return {
        group: sum(m.norm**2 * m.energy[rank] for m in found) / sum(m.norm**2 for m in found)
        for group, found in sorted(groups.items())
    }


def energy_png(report: ExtractReport) -> bytes:
    """Two charts in one picture: over the layers and over the modules, a line for each rank."""
    layers, modules = by_layer(report), by_module(report)
    styles: dict[str, Mapping[str, Any]] = {
        f"rank {rank}": {"color": _COLOURS[n % len(_COLOURS)], "linestyle": _LINES[n // len(_COLOURS) % len(_LINES)]}
        for n, rank in enumerate(layers)
    }

    def draw(shares: Mapping[int, Mapping[Any, float]], axes: Axes, label: str) -> None:
        for (_, values), style in zip(shares.items(), styles.values(), strict=True):
            axes.plot([*map(str, values)], [*values.values()], marker="o", **style)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(label)
        axes.set_ylabel("retained energy")

    charts = [
        Chart("layers", "By layer", "Retained energy of each layer", lambda axes: draw(layers, axes, "layer")),
        Chart("modules", "By module", "Retained energy of each module", lambda axes: draw(modules, axes, "")),
    ]
    return charts_png(charts, tuple(styles.items()))
