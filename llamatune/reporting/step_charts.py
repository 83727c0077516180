"""Charts of one value of each update: learning rate, gradient norm, speed, memory, fp16's loss scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamatune.events import Step
from llamatune.reporting.chart_images import Legend
from llamatune.reporting.curves import INK, Curve, draw_line, make_logarithmic
from llamatune.units import gibibytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A peak that moved by less than this share is one number: a CPU's resident memory, or rows of nearly the same length.
_MEMORY_FLAT = 0.1


def _time_unit(curves: Sequence[Curve]) -> tuple[str, float]:
    """The unit of time in which the longest run has a few to a few hundred, and its seconds."""
    longest_s = max((curve.steps[-1].elapsed_s for curve in curves if curve.steps), default=0.0)
    return ("hours", 3600.0) if longest_s > 3 * 3600 else ("minutes", 60.0) if longest_s > 180 else ("seconds", 1.0)


@dataclass(frozen=True)
class StepChart:
    """A chart of one value of each update: over steps, or over time.

    Args:
        text: a value in words.
        scale: what a value is divided by on the axis.
        flat: a curve that spans less than this share of its highest value shows nothing.
        log: a logarithmic axis, without values that are not positive.
        clipping: a dotted line at ``max_grad_norm``.
    """

    name: str
    title: str
    label: str
    value: Callable[[Step], float]
    text: Callable[[float], str]
    scale: float = 1.0
    flat: float = 1e-9
    over_time: bool = False
    log: bool = False
    clipping: bool = False
    linewidth: float = 1.6

    def _shown(self, curve: Curve) -> list[Step]:
        return [step for step in curve.steps if not self.log or self.value(step) > 0]

    def changes(self, curves: Sequence[Curve]) -> bool:
        """Whether any curve is more than a level line."""
        for curve in curves:
            values = [self.value(step) for step in self._shown(curve)]
            if values and max(values) - min(values) > self.flat * max(map(abs, values)):
                return True
        return False

    def levels(self, curves: Sequence[Curve]) -> str:
        """The last value of each run; empty without any."""
        last = {curve.run.name: self.text(self.value(curve.steps[-1])) for curve in curves if curve.steps}
        return ", ".join(last.values() if len(last) == 1 else (f"{name}: {text}" for name, text in last.items()))

    def draw(self, axes: Axes, curves: Sequence[Curve]) -> None:
        unit, unit_s = _time_unit(curves)
        for curve in curves:
            shown = self._shown(curve)
            x = [step.elapsed_s / unit_s if self.over_time else step.step for step in shown]
            draw_line(axes, curve, x, [self.value(step) / self.scale for step in shown], linewidth=self.linewidth)
        if self.log:
            make_logarithmic(axes)
        for curve in curves if self.clipping else ():
            limit = curve.run.spec.training.max_grad_norm
            if limit is not None and curve.steps:
                axes.axhline(limit, color=curve.style["color"], linestyle=":", linewidth=1.2)
        axes.set(xlabel=unit if self.over_time else "step", ylabel=self.label)

    def legend(self, curves: Sequence[Curve]) -> Legend:
        """Beside the runs: what a dotted line is."""
        clips = self.clipping and any(curve.run.spec.training.max_grad_norm is not None for curve in curves)
        colour = curves[0].style["color"] if len(curves) == 1 else INK
        return (("clipped to", {"color": colour, "linestyle": ":", "linewidth": 1.2}),) if clips else ()

    def describe(self, curve: Curve) -> str:
        values = [self.value(step) for step in curve.steps]
        first, last, lowest, highest = map(self.text, (values[0], values[-1], min(values), max(values)))
        return f"from {first} to {last}, between {lowest} and {highest}"


def step_charts(curves: Sequence[Curve]) -> list[StepChart]:
    """Those of these runs; a chart may be of a value that never changes."""
    peak = max((step.peak_memory_bytes for curve in curves for step in curve.steps[-1:]), default=0)
    unit, size = ("GiB", 2.0**30) if peak >= 1 << 30 else ("MiB", 2.0**20)
    three_digits = "{:.3g}".format
    charts = [
        StepChart("learning-rate", "Learning rate", "learning rate", lambda step: step.learning_rate, three_digits),
        StepChart(
            "gradient-norm", "Gradient norm before clipping", "norm before clipping",
            lambda step: step.grad_norm, three_digits, log=True, clipping=True, linewidth=0.9,
        ),
        StepChart(
            "throughput", "Throughput", "tokens/s",
            lambda step: step.tokens_per_second, "{:,.0f}".format, over_time=True, linewidth=0.9,
        ),
        StepChart(
            "memory", "Peak memory so far", unit, lambda step: step.peak_memory_bytes, gibibytes,
            scale=size, flat=_MEMORY_FLAT, over_time=True,
        ),
    ]  # fmt: skip
    if any(curve.run.spec.training.precision == "fp16" and curve.steps for curve in curves):
        charts.append(
            StepChart(
                "loss-scale", "Loss scale of fp16", "loss scale", lambda step: step.loss_scale, "{:,g}".format, log=True
            )
        )
    return charts
