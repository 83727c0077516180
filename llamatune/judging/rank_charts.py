"""Charts of the rank that an adapter uses: over the layers, and the fall of the singular values."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from llamatune.judging.rank_used import LayerRank, RankUse
from llamatune.reporting.chart_images import PALETTE, Chart, charts_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = [light for name, (light, _) in PALETTE.items() if name.startswith("series")]
_LINES = ("-", "--")


def by_module(use: RankUse) -> dict[str, list[LayerRank]]:
    """The adapted matrices of each module, in the order of the layers."""
    modules: dict[str, list[LayerRank]] = {}
    for layer in use.layers:
        modules.setdefault(layer.module, []).append(layer)
    return modules


def rank_png(use: RankUse) -> bytes:
    """Two charts in one picture, a line for each module."""
    modules = by_module(use)
    styles: dict[str, Mapping[str, Any]] = {
        name: {"color": _COLOURS[n % len(_COLOURS)], "linestyle": _LINES[n // len(_COLOURS) % len(_LINES)]}
        for n, name in enumerate(modules)
    }

    def over_layers(axes: Axes) -> None:
        for name, layers in modules.items():
            places = [layer.layer for layer in layers]
            axes.plot(places, [layer.effective_rank for layer in layers], marker="o", **styles[name])
        axes.set_ylim(0, 1.05 * max(layer.r for layer in use.layers))
        _count_whole(axes)
        axes.set_xlabel("layer")
        axes.set_ylabel("effective rank")

    def over_values(axes: Axes) -> None:
        for name, layers in modules.items():
            values = _typical(layers)
            axes.plot(range(1, len(values) + 1), values, marker="o", **styles[name])
        axes.set_ylim(0, 1.05)
        _count_whole(axes)
        axes.set_xlabel("number of the singular value")
        axes.set_ylabel("share of the largest")

    charts = [
        Chart("layers", "Effective rank by layer", "Effective rank of each layer's update", over_layers),
        Chart("values", "Singular values, median over layers", "Fall of the singular values", over_values),
    ]
    return charts_png(charts, tuple(styles.items()))


def _count_whole(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _typical(layers: list[LayerRank]) -> list[float]:
    """The median over the layers of each singular value's share of the largest; a matrix without update has none."""
    shares = [[v / layer.singular_values[0] for v in layer.singular_values] for layer in layers if layer.effective_rank]
    longest = max(map(len, shares), default=0)
    return [median(values[n] for values in shares if n < len(values)) for n in range(longest)]
