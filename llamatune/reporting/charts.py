"""The charts of a report: loss, perplexity, epochs, learning rate, gradient norm, speed, memory, loss scale, layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from llamatune.events import Step
from llamatune.reporting.averages import Epoch
from llamatune.reporting.chart_images import PALETTE, Chart
from llamatune.reporting.run_reader import Run
from llamatune.reporting.spikes import Spike
from llamatune.units import perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SERIES = [name for name in PALETTE if name.startswith("series")]
_MARKERS = (
    ("o", "circles"), ("s", "squares"), ("D", "diamonds"),
    ("^", "triangles"), ("v", "triangles, tip down"), ("P", "crosses"),
)  # fmt: skip
_DASHES = ((), (5, 1.5), (1, 1))
"""Lengths drawn and left out, in line widths. When all colours are used, they repeat with the next dashes."""
_INK = PALETTE["ink"][0]
_MOST_LINE_POINTS, _MOST_DOTS, _MOST_COLUMNS = 1200, 600, 400
_HIGHEST_LOSS_SHOWN = 50.0
"""Its perplexity is 5e21; a larger value would flatten the rest of the axis."""


@dataclass(frozen=True)
class Curve:
    """A run and its smoothed loss, epochs and spikes; ``place`` among the runs decides colour, marker and dashes."""

    run: Run
    place: int
    smoothed: list[float]
    epochs: list[Epoch]
    spikes: list[Spike]

    @property
    def steps(self) -> list[Step]:
        return self.run.metrics.steps

    @property
    def series(self) -> str:
        return _SERIES[self.place % len(_SERIES)]

    @property
    def dashes(self) -> tuple[float, ...]:
        return _DASHES[self.place // len(_SERIES) % len(_DASHES)]

    @property
    def marker(self) -> tuple[str, str]:
        """The marker of validation losses: matplotlib's name, and the name in the legend."""
        return _MARKERS[self.place % len(_MARKERS)]

    @property
    def style(self) -> dict[str, Any]:
        return {"color": PALETTE[self.series][0], "linestyle": (0, self.dashes) if self.dashes else "-"}

    @property
    def validation_style(self) -> dict[str, Any]:
        return {**self.style, "linestyle": (0, (4, 2)), "linewidth": 1.2, "marker": self.marker[0]}


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


def _line(axes: Axes, curve: Curve, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    kept = thinned(y, _MOST_LINE_POINTS)
    style = {**curve.style, "marker": "o" if len(kept) == 1 else "", **style}
    axes.plot([x[i] for i in kept], [y[i] for i in kept], **style)


def _logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers as ticks even where it spans no power of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if highest < 1000 * lowest else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_loss(axes: Axes, curves: Sequence[Curve], value: Callable[[float], float], label: str) -> None:
    """Raw and smoothed training loss, validation loss and spikes over steps; ``value`` turns a loss into a height."""
    for curve in curves:
        x = [step.step for step in curve.steps]
        _line(axes, curve, x, [value(step.loss) for step in curve.steps], linewidth=0.7, alpha=0.4)
        _line(axes, curve, x, [value(loss) for loss in curve.smoothed])
        evaluations = curve.run.metrics.all_evaluations
        evaluated = [evaluation.step for evaluation in evaluations]
        _line(axes, curve, evaluated, [value(evaluation.loss) for evaluation in evaluations], **curve.validation_style)
        peaks, heights = [spike.step for spike in curve.spikes], [value(spike.loss) for spike in curve.spikes]
        axes.plot(peaks, heights, "x", color=_INK, markersize=6)
    axes.set(xlabel="step", ylabel=label)


def _draw_perplexity(axes: Axes, curves: Sequence[Curve]) -> None:
    _draw_loss(axes, curves, lambda loss: perplexity(min(loss, _HIGHEST_LOSS_SHOWN)), "perplexity")
    _logarithmic(axes)


def _draw_epochs(axes: Axes, curves: Sequence[Curve]) -> None:
    """Each update as a dot over its epoch, each epoch's mean as a bar, its validation loss at its end."""
    for curve in curves:
        losses = [step.loss for step in curve.steps]
        kept = thinned(losses, _MOST_DOTS)
        axes.plot(
            [curve.steps[i].epoch for i in kept], [losses[i] for i in kept],
            ".", color=curve.style["color"], alpha=0.35, markersize=3, markeredgewidth=0,
        )  # fmt: skip
        for epoch in curve.epochs:
            end = min(epoch.epoch, curve.steps[-1].epoch)
            axes.hlines(epoch.train_loss, epoch.epoch - 1, end, **{**curve.style, "linewidth": 2.2})
        ends = {e.epoch: e.validation_loss for e in curve.epochs if e.validation_loss is not None}
        axes.plot(list(ends), list(ends.values()), **curve.validation_style)
    axes.set(xlabel="epoch", ylabel="loss, nats per token")


class _StepChart(NamedTuple):
    """A chart of one value of each update: over steps, or over minutes.

    ``log``: a logarithmic axis, without values that are not positive. ``clipping``: a dotted line at ``max_grad_norm``.
    """

    name: str
    title: str
    label: str
    value: Callable[[Step], float]
    form: str
    over_minutes: bool = False
    log: bool = False
    clipping: bool = False
    linewidth: float = 1.6

    def draw(self, axes: Axes, curves: Sequence[Curve]) -> None:
        for curve in curves:
            shown = [step for step in curve.steps if not self.log or self.value(step) > 0]
            x = [step.elapsed_s / 60 if self.over_minutes else step.step for step in shown]
            _line(axes, curve, x, [self.value(step) for step in shown], linewidth=self.linewidth)
        if self.log and any(self.value(step) > 0 for curve in curves for step in curve.steps):
            _logarithmic(axes)
        for curve in curves if self.clipping else ():
            limit = curve.run.spec.training.max_grad_norm
            if limit is not None and curve.steps:
                axes.axhline(limit, color=curve.style["color"], linestyle=":", linewidth=1.2)
        axes.set(xlabel="minutes" if self.over_minutes else "step", ylabel=self.label)

    def describe(self, curve: Curve) -> str:
        values = [self.value(step) for step in curve.steps]
        first, last, lowest, highest = (f"{x:{self.form}}" for x in (values[0], values[-1], min(values), max(values)))
        return f"from {first} to {last}, between {lowest} and {highest}"


_STEP_CHARTS = (
    _StepChart("learning-rate", "Learning rate", "learning rate", lambda step: step.learning_rate, ".3g"),
    _StepChart(
        "gradient-norm", "Gradient norm before clipping", "norm before clipping",
        lambda step: step.grad_norm, ".3g", log=True, clipping=True, linewidth=0.9,
    ),
    _StepChart(
        "throughput", "Throughput", "tokens/s",
        lambda step: step.tokens_per_second, ",.0f", over_minutes=True, linewidth=0.9,
    ),
    _StepChart(
        "memory", "Peak memory so far", "GiB", lambda step: step.peak_memory_bytes / 2**30, ".3g", over_minutes=True
    ),
)  # fmt: skip
_LOSS_SCALE = _StepChart("loss-scale", "Loss scale of fp16", "loss scale", lambda step: step.loss_scale, "g", log=True)


def _draw_layers(axes: Axes, curve: Curve) -> None:
    """A map of gradient norms: blocks from bottom to top, steps from left to right, colour by magnitude."""
    from matplotlib.colors import LogNorm

    steps = sorted(curve.run.metrics.layer_grad_norms)
    names = list(dict.fromkeys(name for step in steps for name in curve.run.metrics.layer_grad_norms[step]))
    kept = steps[:: -(-len(steps) // _MOST_COLUMNS)]
    table = [[curve.run.metrics.layer_grad_norms[step].get(name, 0.0) for step in kept] for name in names]
    positive = [norm for row in table for norm in row if norm > 0] or [1.0]
    image = axes.imshow(
        [[norm if norm > 0 else math.nan for norm in row] for row in table],
        norm=LogNorm(min(positive), max(max(positive), min(positive) * 1.01)),
        cmap="cividis", aspect="auto", origin="lower", interpolation="nearest",
        extent=(kept[0] - 0.5, steps[-1] + 0.5, -0.5, len(names) - 0.5),
    )  # fmt: skip
    places = range(0, len(names), -(-len(names) // 12))
    axes.set_yticks(list(places), [names[place][:24] for place in places])
    axes.grid(visible=False)
    axes.set(xlabel="step")
    axes.figure.colorbar(image, ax=axes, label="gradient norm", format="{x:g}")


def _describe_loss(curve: Curve) -> str:
    losses = [evaluation.loss for evaluation in curve.run.metrics.evaluations]
    held_out = f", lowest validation loss {min(losses):.4g}, last {losses[-1]:.4g}" if losses else ""
    at_start = curve.run.metrics.at_start
    before = "" if at_start is None else f", validation loss before training {at_start.loss:.4g}"
    return f"smoothed loss from {curve.smoothed[0]:.4g} to {curve.smoothed[-1]:.4g}{before}{held_out}"


def make_charts(curves: Sequence[Curve]) -> list[Chart]:
    """Every chart for which a run has values; the description that a screen reader reads has a clause a run."""

    def epoch_losses(curve: Curve) -> str:
        return ", ".join(f"{epoch.train_loss:.4g}" for epoch in curve.epochs)

    def skipped(curve: Curve) -> str:
        return f"{len(curve.run.metrics.skipped)} windows skipped"

    def chart(name: str, title: str, draw: Callable[..., None], describe: Callable[[Curve], str]) -> Chart:
        clauses = [f"{curve.run.name}: {describe(curve)}" for curve in curves if curve.steps]
        return Chart(name, title, "; ".join(clauses) or "no steps yet", partial(draw, curves=curves))

    draw_loss = partial(_draw_loss, value=float, label="loss, nats per token")
    charts = [
        chart("loss", "Loss", draw_loss, _describe_loss),
        Chart("perplexity", "Perplexity", "exp(loss) on a logarithmic axis", partial(_draw_perplexity, curves=curves)),
        chart("epochs", "Updates and epoch means", _draw_epochs, epoch_losses),
        *(chart(each.name, each.title, each.draw, each.describe) for each in _STEP_CHARTS),
    ]
    if any(curve.run.spec.training.precision == "fp16" and curve.steps for curve in curves):
        charts.append(chart(_LOSS_SCALE.name, _LOSS_SCALE.title, _LOSS_SCALE.draw, skipped))
    for curve in curves:
        if curve.run.metrics.layer_grad_norms:
            title = "Gradient norm by layer" + (f", {curve.run.name[:40]}" if len(curves) > 1 else "")
            draw_layers = partial(_draw_layers, curve=curve)
            charts.append(Chart(f"layers-{curve.place}", title, "a map of layers over steps", draw_layers))
    return charts
