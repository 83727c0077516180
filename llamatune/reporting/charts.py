"""The charts of a report: loss, perplexity, epochs, values of each update, gradient norms by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llamatune.reporting.chart_images import Chart, Legend
from llamatune.reporting.curves import (
    INK,
    SPIKE_STYLE,
    Curve,
    draw_line,
    make_logarithmic,
    short_name,
    short_names,
    thinned,
)
from llamatune.reporting.step_charts import step_charts
from llamatune.units import perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_DOTS, _MOST_COLUMNS = 600, 400
_HIGHEST_LOSS_SHOWN = 50.0
"""Its perplexity is 5e21; a larger value would flatten the rest of the axis."""


def _draw_loss(axes: Axes, curves: Sequence[Curve], value: Callable[[float], float], label: str) -> None:
    """Raw and smoothed training loss, validation loss and spikes over steps; ``value`` turns a loss into a height."""
    for curve in curves:
        x = [step.step for step in curve.steps]
        draw_line(axes, curve, x, [value(step.loss) for step in curve.steps], **curve.update_style)
        draw_line(axes, curve, x, [value(loss) for loss in curve.smoothed])
        evaluations = curve.run.metrics.all_evaluations
        evaluated = [evaluation.step for evaluation in evaluations]
        draw_line(axes, curve, evaluated, [value(evaluation.loss) for evaluation in evaluations],
                  **curve.validation_style)  # fmt: skip
        peaks, heights = [spike.step for spike in curve.spikes], [value(spike.loss) for spike in curve.spikes]
        axes.plot(peaks, heights, **SPIKE_STYLE)
    axes.set(xlabel="step", ylabel=label)


def _draw_perplexity(axes: Axes, curves: Sequence[Curve]) -> None:
    _draw_loss(axes, curves, lambda loss: perplexity(min(loss, _HIGHEST_LOSS_SHOWN)), "perplexity")
    make_logarithmic(axes)


def _dot_size(count: int) -> float:
    """Points; as large as so many dots allow."""
    return 6.5 if count <= 150 else 5.0 if count <= 400 else 4.0


def _dot_style(curve: Curve) -> dict[str, Any]:
    size = _dot_size(min(len(curve.steps), _MOST_DOTS))
    return {"color": curve.style["color"], "linestyle": "", "marker": "o", "alpha": 0.45, "markersize": size,
            "markeredgewidth": 0}  # fmt: skip


def _draw_epochs(axes: Axes, curves: Sequence[Curve]) -> None:
    """Each update as a dot over its epoch, each epoch's mean as a bar, its validation loss at its end."""
    for curve in curves:
        losses = [step.loss for step in curve.steps]
        kept = thinned(losses, _MOST_DOTS)
        axes.plot([curve.steps[i].epoch for i in kept], [losses[i] for i in kept], **_dot_style(curve))
        for epoch in curve.epochs:
            end = min(epoch.epoch, curve.steps[-1].epoch)
            axes.hlines(epoch.train_loss, epoch.epoch - 1, end, **curve.mean_style)
        ends = {e.epoch: e.validation_loss for e in curve.epochs if e.validation_loss is not None}
        axes.plot(list(ends), list(ends.values()), **curve.validation_style)
    axes.set(xlabel="epoch", ylabel="loss, nats per token")


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


def run_legend(curves: Sequence[Curve]) -> Legend:
    """A line for each run."""
    names = short_names([curve.run.name for curve in curves])
    return tuple((name, curve.style) for name, curve in zip(names, curves, strict=True))


def loss_legend(curves: Sequence[Curve]) -> Legend:
    """What the lines of the loss are; in the run's colour if there is one run."""
    like = curves[0]
    colour = {} if len(curves) == 1 else {"color": INK}
    kinds: list[tuple[str, dict[str, Any]]] = []
    if any(curve.steps for curve in curves):
        kinds += [("training, each update", {**like.update_style, **colour})]
        kinds += [("training, moving average", {**like.style, **colour})]
    if any(curve.run.metrics.all_evaluations for curve in curves):
        kinds += [("validation", {**like.validation_style, **colour})]
    if any(curve.spikes for curve in curves):
        kinds += [("spike", SPIKE_STYLE)]
    return tuple(kinds)


def whole_legend(curves: Sequence[Curve]) -> Legend:
    """Of all charts in one picture."""
    clipped = tuple(entry for each in step_charts(curves) if each.changes(curves) for entry in each.legend(curves))
    runs = run_legend(curves) if len(curves) > 1 else ()
    return (*runs, *loss_legend(curves), ("mean of an epoch", {**curves[0].mean_style, "color": INK}), *clipped)


def _epochs_legend(curves: Sequence[Curve]) -> Legend:
    like = curves[0]
    colour = {} if len(curves) == 1 else {"color": INK}
    validated = any(epoch.validation_loss is not None for curve in curves for epoch in curve.epochs)
    return (
        ("one update", {**_dot_style(like), **colour}),
        ("mean of the epoch", {**like.mean_style, **colour}),
        *((("validation", {**like.validation_style, **colour}),) if validated else ()),
    )


def make_charts(curves: Sequence[Curve]) -> list[Chart]:
    """Every chart that shows something; the description that a screen reader reads has a clause a run."""

    def epoch_losses(curve: Curve) -> str:
        return ", ".join(f"{epoch.train_loss:.4g}" for epoch in curve.epochs)

    def chart(
        name: str, title: str, draw: Callable[..., None], describe: Callable[[Curve], str], legend: Legend
    ) -> Chart:
        clauses = [f"{curve.run.name}: {describe(curve)}" for curve in curves if curve.steps]
        runs = run_legend(curves) if len(curves) > 1 or not legend else ()
        return Chart(name, title, "; ".join(clauses) or "no steps yet", partial(draw, curves=curves), (*runs, *legend))

    charts = []
    if any(curve.steps or curve.run.metrics.all_evaluations for curve in curves):
        draw_loss = partial(_draw_loss, value=float, label="loss, nats per token")
        legend = loss_legend(curves)
        charts += [chart("loss", "Loss", draw_loss, _describe_loss, legend)]
        charts += [chart("perplexity", "Perplexity", _draw_perplexity, lambda curve: "exp(loss)", legend)]
    if any(curve.steps for curve in curves):
        charts += [chart("epochs", "Updates and epoch means", _draw_epochs, epoch_losses, _epochs_legend(curves))]
    for each in step_charts(curves):
        if each.changes(curves):
            charts.append(chart(each.name, each.title, each.draw, each.describe, each.legend(curves)))
    for curve in curves:
        if curve.run.metrics.layer_grad_norms:
            title = "Gradient norm by layer" + (f", {short_name(curve.run.name, 30)}" if len(curves) > 1 else "")
            draw_layers = partial(_draw_layers, curve=curve)
            charts.append(Chart(f"layers-{curve.place}", title, "a map of layers over steps", draw_layers))
    return charts


def level_values(curves: Sequence[Curve]) -> dict[str, str]:
    """What would be a level line in its chart, which is left out: its title, and its values in words."""
    level = [each for each in step_charts(curves) if not each.changes(curves)]
    return {each.title: text for each in level if (text := each.levels(curves))}
