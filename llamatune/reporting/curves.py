"""Curves of a run: its smoothed loss, epochs and spikes, its place in the charts' colours, and how lines are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llamatune.events import Step
from llamatune.reporting.averages import Epoch
from llamatune.reporting.chart_images import PALETTE
from llamatune.reporting.run_reader import Run
from llamatune.reporting.spikes import Spike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = [name for name in PALETTE if name.startswith("series")]
INK = PALETTE["ink"][0]
_MARKERS = (
    ("o", "circles"), ("s", "squares"), ("D", "diamonds"),
    ("^", "triangles"), ("v", "triangles, tip down"), ("P", "crosses"),
)  # fmt: skip
_DASHES = ((), (5, 1.5), (1, 1))
"""Lengths drawn and left out, in line widths. When all colours are used, they repeat with the next dashes."""
MOST_LINE_POINTS = 1200


@dataclass(frozen=True)
class Curve:
    """A run and its smoothed loss, epochs and spikes; ``place`` among the runs decides colour, marker and dashes."""

    run: Run
    place: int
    smoothed: list[float]
    epochs: list[Epoch]
    spikes: Sequence[Spike]

    @property
    def steps(self) -> list[Step]:
        return self.run.metrics.steps

    @property
    def series(self) -> str:
        return SERIES[self.place % len(SERIES)]

    @property
    def dashes(self) -> tuple[float, ...]:
        return _DASHES[self.place // len(SERIES) % len(_DASHES)]

    @property
    def marker(self) -> tuple[str, str]:
        """The marker of validation losses: matplotlib's name, and the name in the legend."""
        return _MARKERS[self.place % len(_MARKERS)]

    @property
    def style(self) -> dict[str, Any]:
        return {"color": PALETTE[self.series][0], "linestyle": (0, self.dashes) if self.dashes else "-"}

    @property
    def update_style(self) -> dict[str, Any]:
        """Of a line through each update."""
        return {**self.style, "linewidth": 0.8, "alpha": 0.45}

    @property
    def validation_style(self) -> dict[str, Any]:
        return {**self.style, "linestyle": (0, (4, 2)), "linewidth": 1.2, "marker": self.marker[0]}

    @property
    def mean_style(self) -> dict[str, Any]:
        """Of the bar of an epoch's mean."""
        return {**self.style, "linewidth": 2.2}


SPIKE_STYLE: dict[str, Any] = {"color": INK, "linestyle": "", "marker": "x", "markersize": 7, "markeredgewidth": 1.6}


def short_names(names: Sequence[str]) -> list[str]:
    """Each name without its middle if it is long, and behind its number where two would be alike."""
    short = [short_name(name) for name in names]
    alike = len(set(short)) < len(set(names))
    return [f"{number}: {short_name(name, 44)}" for number, name in enumerate(names, 1)] if alike else short


def short_name(name: str, most: int = 48) -> str:
    """A name in at most ``most`` characters, without its middle: names of a sweep often differ at the end alone."""
    return name if len(name) <= most else f"{name[: most // 2 - 2]}...{name[-(most // 2 - 1) :]}"


def thinned(values: Sequence[float], limit: int) -> list[int]:
    """At most ``limit`` indices to draw: the lowest and the highest value of each stretch, so that no spike is lost."""
    if len(values) <= limit:
        return list(range(len(values)))
    stretches = max(1, limit // 2)
    kept = set()
    for number in range(stretches):
        places = range(number * len(values) // stretches, (number + 1) * len(values) // stretches)
        kept |= {min(places, key=values.__getitem__), max(places, key=values.__getitem__)}
    return sorted(kept)


def draw_line(axes: Axes, curve: Curve, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """A line in the curve's style, or a dot where there is one value."""
    kept = thinned(y, MOST_LINE_POINTS)
    style = {**curve.style, "marker": "o" if len(kept) == 1 else "", **style}
    axes.plot([x[i] for i in kept], [y[i] for i in kept], **style)


def make_logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers as ticks even where it spans no power of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if highest < 1000 * lowest else (1.0,)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(NullLocator())
