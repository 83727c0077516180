"""Which charts there are, and what each draws of one run or several."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llamatune.reporting.averages import Epoch, thinned
from llamatune.reporting.chart_images import PALETTE, Chart
from llamatune.reporting.diagnosis import Spike
from llamatune.reporting.run_reader import Run, Step
from llamatune.units import perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SERIES = [name for name in PALETTE if name.startswith("series")]
_MARKERS = {
    "o": "circles",
    "s": "squares",
    "D": "diamonds",
    "^": "triangles",
    "v": "triangles, tip down",
    "P": "crosses",
}
_DASHES = ((), (5, 1.5), (1, 1))
"""On and off in units of the line's width; the colours begin again with the next."""
_INK = PALETTE["ink"][0]
_MOST_LINE_POINTS, _MOST_DOTS, _MOST_COLUMNS = 1200, 600, 400
_HIGHEST_LOSS_SHOWN = 50.0
"""Its perplexity is 5e21; beyond that an axis shows nothing else."""


@dataclass(frozen=True)
class Curve:
    """A run as it is drawn: its place among the runs decides colour, marker and dashes."""

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
        """matplotlib's name of the validation marker, and ours."""
        return list(_MARKERS.items())[self.place % len(_MARKERS)]

    @property
    def style(self) -> dict[str, Any]:
        """How its lines are drawn."""
        return {"color": PALETTE[self.series][0], "linestyle": (0, self.dashes) if self.dashes else "-"}

    @property
    def validation_style(self) -> dict[str, Any]:
        return {**self.style, "linestyle": (0, (4, 2)), "linewidth": 1.2, "marker": self.marker[0]}


def _line(axes: Axes, curve: Curve, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    kept = thinned(y, _MOST_LINE_POINTS)
    style = {**curve.style, "marker": "o" if len(kept) == 1 else "", **style}
    axes.plot([x[i] for i in kept], [y[i] for i in kept], **style)


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis whose ticks are plain numbers, also where it spans no power of ten."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if highest < 1000 * lowest else (1.0,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _loss(curves: Sequence[Curve], value: Callable[[float], float], unit: str) -> Callable[[Axes], None]:
    """Raw and smoothed training loss and validation loss over steps, each through ``value``."""

    def draw(axes: Axes) -> None:
        for curve in curves:
            x = [step.step for step in curve.steps]
            _line(axes, curve, x, [value(step.loss) for step in curve.steps], linewidth=0.7, alpha=0.4)
            _line(axes, curve, x, [value(loss) for loss in curve.smoothed])
            found = curve.run.metrics.evaluations
            validation = [value(evaluation.loss) for evaluation in found]
            place = [evaluation.step for evaluation in found]
            _line(axes, curve, place, validation, **curve.validation_style)
            axes.plot(
                [spike.step for spike in curve.spikes],
                [value(spike.loss) for spike in curve.spikes],
                "x", color=_INK, markersize=6,
            )  # fmt: skip
        axes.set(xlabel="step", ylabel=unit)

    return draw


def _epochs(curves: Sequence[Curve]) -> Callable[[Axes], None]:
    """Every update as a dot over its epoch, the epoch's mean as a bar across it, its validation loss at its end."""

    def draw(axes: Axes) -> None:
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

    return draw


def _over(
    curves: Sequence[Curve],
    x: Callable[[Step], float],
    y: Callable[[Step], float],
    labels: tuple[str, str],
    log: bool = False,
    **style: Any,
) -> Callable[[Axes], None]:
    """One value of each step over another; ``log``: on a logarithmic axis, without what is not positive."""

    def draw(axes: Axes) -> None:
        for curve in curves:
            shown = [step for step in curve.steps if not log or y(step) > 0]
            _line(axes, curve, [x(step) for step in shown], [y(step) for step in shown], **style)
        if log and any(y(step) > 0 for curve in curves for step in curve.steps):
            _logarithmic(axes)
        axes.set(xlabel=labels[0], ylabel=labels[1])

    return draw


def _grad_norm(curves: Sequence[Curve]) -> Callable[[Axes], None]:
    lines = _over(curves, _step, lambda step: step.grad_norm, ("step", "norm before clipping"), True, linewidth=0.9)

    def draw(axes: Axes) -> None:
        lines(axes)
        for curve in curves:
            limit = curve.run.spec.training.max_grad_norm
            if limit is not None and curve.steps:
                axes.axhline(limit, color=curve.style["color"], linestyle=":", linewidth=1.2)

    return draw


def _layers(curve: Curve) -> Callable[[Axes], None]:
    """A map of gradient norms: blocks from bottom to top, steps from left to right, colour by magnitude."""
    from matplotlib.colors import LogNorm

    steps = sorted(curve.run.metrics.layer_grad_norms)
    names = list(dict.fromkeys(name for step in steps for name in curve.run.metrics.layer_grad_norms[step]))
    kept = steps[:: -(-len(steps) // _MOST_COLUMNS)]
    table = [[curve.run.metrics.layer_grad_norms[step].get(name, 0.0) for step in kept] for name in names]
    positive = [norm for row in table for norm in row if norm > 0] or [1.0]

    def draw(axes: Axes) -> None:
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

    return draw


def _step(step: Step) -> float:
    return step.step


def _minutes(step: Step) -> float:
    return step.elapsed_s / 60


def _said(curves: Sequence[Curve], value: Callable[[Curve], str]) -> str:
    """One clause a run, for those who hear the page."""
    return "; ".join(f"{curve.run.name}: {value(curve)}" for curve in curves if curve.steps) or "no steps yet"


def _range(value: Callable[[Step], float], form: str) -> Callable[[Curve], str]:
    def said(curve: Curve) -> str:
        values = [value(step) for step in curve.steps]
        return f"from {values[0]:{form}} to {values[-1]:{form}}, between {min(values):{form}} and {max(values):{form}}"

    return said


def _loss_said(curve: Curve) -> str:
    losses = [evaluation.loss for evaluation in curve.run.metrics.evaluations]
    held_out = f", lowest validation loss {min(losses):.4g}, last {losses[-1]:.4g}" if losses else ""
    return f"smoothed loss from {curve.smoothed[0]:.4g} to {curve.smoothed[-1]:.4g}{held_out}"


def _capped_perplexity(loss: float) -> float:
    return perplexity(min(loss, _HIGHEST_LOSS_SHOWN))


def make_charts(curves: Sequence[Curve]) -> list[Chart]:
    """Every chart that the runs have something for."""

    def tokens_per_second(step: Step) -> float:
        return step.tokens_per_second

    def memory_gib(step: Step) -> float:
        return step.peak_memory_bytes / 2**30

    def loss_scale(step: Step) -> float:
        return step.loss_scale

    perplexities = _loss(curves, _capped_perplexity, "perplexity")

    def draw_perplexity(axes: Axes) -> None:
        perplexities(axes)
        _logarithmic(axes)

    charts = [
        Chart("loss", "Loss", _said(curves, _loss_said), _loss(curves, float, "loss, nats per token")),
        Chart("perplexity", "Perplexity", "exp(loss) on a logarithmic axis", draw_perplexity),
        Chart(
            "epochs",
            "Updates and epoch means",
            _said(curves, lambda curve: ", ".join(f"{epoch.train_loss:.4g}" for epoch in curve.epochs)),
            _epochs(curves),
        ),
        Chart(
            "learning-rate",
            "Learning rate",
            _said(curves, _range(lambda step: step.learning_rate, ".3g")),
            _over(curves, _step, lambda step: step.learning_rate, ("step", "learning rate")),
        ),
        Chart(
            "gradient-norm",
            "Gradient norm before clipping",
            _said(curves, _range(lambda step: step.grad_norm, ".3g")),
            _grad_norm(curves),
        ),
        Chart(
            "throughput",
            "Throughput",
            _said(curves, _range(tokens_per_second, ",.0f")),
            _over(curves, _minutes, tokens_per_second, ("minutes", "tokens/s"), linewidth=0.9),
        ),
        Chart(
            "memory",
            "Peak memory so far",
            _said(curves, _range(memory_gib, ".3g")),
            _over(curves, _minutes, memory_gib, ("minutes", "GiB")),
        ),
    ]
    if any(curve.run.spec.training.precision == "fp16" and curve.steps for curve in curves):
        said = _said(curves, lambda curve: f"{len(curve.run.metrics.skipped)} windows skipped")
        draw = _over(curves, _step, loss_scale, ("step", "loss scale"), log=True)
        charts.append(Chart("loss-scale", "Loss scale of fp16", said, draw))
    for curve in curves:
        if curve.run.metrics.layer_grad_norms:
            title = "Gradient norm by layer" + (f", {curve.run.name[:40]}" if len(curves) > 1 else "")
            charts.append(Chart(f"layers-{curve.place}", title, "a map of layers over steps", _layers(curve)))
    return charts
