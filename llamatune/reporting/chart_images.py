"""Charts as images: the style of matplotlib, SVG for a page of two colour schemes, files of one chart, a PNG of all."""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from llamatune.errors import EnvironmentFault

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = {
    "ink": ("#1f2328", "#e6edf3"),
    "faint": ("#c9ced4", "#3d444d"),
    "series-1": ("#054ea1", "#49affa"),
    "series-2": ("#ff362f", "#ff9b63"),
    "series-3": ("#099473", "#5ffcd0"),
    "series-4": ("#a84f9d", "#ce84c8"),
    "series-5": ("#877013", "#e3c33a"),
    "series-6": ("#5b6570", "#adb6bf"),
}
"""Each colour on a light and on a dark page. The series differ with any kind of colour blindness, too."""

_INK, _FAINT = PALETTE["ink"][0], PALETTE["faint"][0]

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text, so that it can be read aloud, searched and scaled
    "svg.hashsalt": "llamatune",  # equal curves give equal bytes
    "text.parse_math": False,  # a run's name may contain a dollar
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.0,
}
_SIZE_INCHES = (5.0, 3.1)
_LEGEND_LINE_INCHES = 0.2
_DPI = 200
IMAGE_KINDS = ("png", "svg", "pdf")
Legend = tuple[tuple[str, Mapping[str, Any]], ...]
"""Names, each with the style of its line or marker."""


@dataclass(frozen=True)
class Chart:
    """One chart: ``draw`` fills its axes; ``description`` is read by screen readers, ``legend`` is for images alone."""

    name: str
    title: str
    description: str
    draw: Callable[[Axes], None]
    legend: Legend = ()


def require_matplotlib() -> None:
    """Raise ``EnvironmentFault`` if matplotlib cannot be imported."""
    _choose_backend()
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise EnvironmentFault("the charts need matplotlib", None, "pip install matplotlib") from None


def _choose_backend() -> None:
    """Draw without a display, whatever ``MPLBACKEND`` says: importing matplotlib fails on an unknown value."""
    os.environ["MPLBACKEND"] = "agg"


@contextlib.contextmanager
def _our_style() -> Iterator[None]:
    """matplotlib's defaults and our style; the user's configuration is ignored."""
    _choose_backend()
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks, an axis without points
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def chart_svg(chart: Chart) -> str:
    """One chart as an SVG element for an HTML page, with title and description; colours are CSS variables."""
    from matplotlib.figure import Figure

    with _our_style():
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        chart.draw(figure.add_subplot())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    view = re.search(r'viewBox="([\d. ]+)"', svg)
    assert view is not None
    body = svg[svg.index("<defs>", view.end()) :]
    # Make ids unique within the page, and use the page's style.
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'( id="|url\(#|href="#)', rf"\1{chart.name}-", body)
    for name, (light, _) in PALETTE.items():
        body = body.replace(light, f"var(--{name})")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view[1]}" '
        f'role="img" aria-labelledby="{chart.name}-title {chart.name}-description">\n'
        f'<title id="{chart.name}-title">{escape(chart.title)}</title>\n'
        f'<desc id="{chart.name}-description">{escape(chart.description)}</desc>\n{body}'
    )


def chart_files(chart: Chart) -> dict[str, bytes]:
    """One chart with its title and legend as ``png``, ``svg`` and ``pdf``; equal curves give equal bytes."""
    from matplotlib.figure import Figure

    no_dates: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "svg": {"Date": None, "Creator": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    files = {}
    with _our_style():
        columns = _legend_columns(chart.legend)
        lines = -(-len(chart.legend) // columns)
        figure = Figure(figsize=(_SIZE_INCHES[0], _SIZE_INCHES[1] + lines * _LEGEND_LINE_INCHES), layout="constrained")
        axes = figure.add_subplot()
        chart.draw(axes)
        axes.set_title(chart.title)
        _add_legend(figure, chart.legend, columns)
        for kind in IMAGE_KINDS:
            stream = io.BytesIO()
            figure.savefig(stream, format=kind, dpi=_DPI, metadata=no_dates[kind])
            files[kind] = stream.getvalue()
    return files


def _legend_columns(legend: Legend) -> int:
    """As many as fit below one chart."""
    widest = max((len(name) for name, _ in legend), default=0)
    return max(1, min(len(legend), 4, int(72 / (widest + 8))))


def _add_legend(figure: Figure, legend: Legend, columns: int) -> None:
    from matplotlib.lines import Line2D

    if legend:
        lines = [Line2D([], [], **style) for _, style in legend]
        names = [name if not name.startswith("_") else f" {name}" for name, _ in legend]
        figure.legend(lines, names, loc="outside lower left", ncols=columns, fontsize=8, borderpad=0.2)


def charts_png(charts: Sequence[Chart], legend: Legend) -> bytes:
    """All charts in one image, two in a row, and one ``legend`` below them."""
    from matplotlib.figure import Figure

    rows = -(-len(charts) // 2) or 1
    columns = 2 * _legend_columns(legend) if len(legend) > 1 else 1
    with _our_style():
        lines = -(-len(legend) // columns)
        size = 2 * _SIZE_INCHES[0], rows * _SIZE_INCHES[1] + lines * _LEGEND_LINE_INCHES
        figure = Figure(figsize=size, layout="constrained")
        # Subfigures, so that a colour bar narrows no other chart.
        parts = figure.subfigures(rows, 2, squeeze=False).flat
        for chart, part in zip(charts, parts[: len(charts)], strict=True):
            axes = part.add_subplot()
            chart.draw(axes)
            axes.set_title(chart.title)
        _add_legend(figure, legend, columns)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150, metadata={"Software": None})
    return stream.getvalue()
