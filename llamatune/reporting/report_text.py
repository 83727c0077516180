"""Figures and findings as text: labels, number formats and sentences for the page and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from llamatune.reporting.diagnosis import Diagnosis
from llamatune.reporting.divergence import Course
from llamatune.reporting.norm_jumps import NormJumps
from llamatune.reporting.over_fitting import DEVIATIONS, RISE, Validation
from llamatune.reporting.spikes import Cause, Spike
from llamatune.reporting.trend import Trend
from llamatune.units import duration, energy, gibibytes

ABSENT = "-"
KEPT = "\n\t\u200c\u200d"
"""Line breaks, tabs and the joiners that Persian, Indic scripts and emoji are written with."""
MANY = 10
"""From this ratio on a change is written as a multiple, not in %."""


def whole(value: float) -> str:
    """``1,234``"""
    return f"{value:,.0f}"


def loss(value: float) -> str:
    """``1.2346``"""
    return f"{value:.4f}"


def two_places(value: float) -> str:
    """``12.35``, ``1,234.57``, and ``1.2e+07`` from a million on."""
    return f"{value:,.2f}" if value < 1e6 else f"{value:.2g}"


_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("steps", whole),
    "epochs": ("epochs", two_places),
    "train_loss": ("training loss, mean of the last epoch", loss),
    "smoothed_train_loss": ("training loss, smoothed, at the end", loss),
    "start_validation_loss": ("validation loss before training", loss),
    "best_validation_loss": ("lowest validation loss", loss),
    "best_validation_step": ("  at step", whole),
    "last_validation_loss": ("last validation loss", loss),
    "last_validation_perplexity": ("  its perplexity", two_places),
    "trainable_parameters": ("trained parameters", whole),
    "total_parameters": ("all parameters", whole),
    "trainable_percent": ("  trained, %", lambda value: f"{value:.4f}"),
    "peak_memory_bytes": ("peak memory", gibibytes),
    "peak_device_memory_bytes": ("  of the whole GPU, all processes", gibibytes),
    "runtime_s": ("runtime", duration),
    "energy_j": ("energy of the GPUs", energy),
    "mean_power_w": ("  mean power, W", whole),
    "peak_power_w": ("  highest of one GPU, W", whole),
    "tokens_per_second": ("tokens/s, whole run", whole),
    "median_tokens_per_second": ("tokens/s, median step", whole),
    "skipped_windows": ("windows skipped by fp16 overflow", whole),
    "ranks": ("ranks that shared the work", whole),
}

PARAMETERS = ("trainable_parameters", "total_parameters", "trainable_percent")
"""Figures of the settings, too."""


def optional(value: float | None, form: Callable[[float], str]) -> str:
    """``value`` as text, or a dash for None."""
    return ABSENT if value is None else form(value)


def figure_rows(runs: list[dict[str, float | None]], without: Container[str] = ()) -> list[tuple[str, list[str]]]:
    """A label and each run's value, for every figure that any of the runs has, but those ``without``."""
    rows = []
    for key, (label, form) in _FIGURES.items():
        values = [figures[key] for figures in runs]
        if key not in without and any(value is not None for value in values):
            rows.append((label, [optional(value, form) for value in values]))
    return rows


def findings(diagnosis: Diagnosis) -> list[str]:
    """The diagnosis in four sentences or paragraphs."""
    parts = [_course(diagnosis.course)]
    parts += [] if diagnosis.jumps is None else [_jumps(diagnosis.jumps)]
    parts += [] if diagnosis.cause is None else [_cause(diagnosis.cause)]
    return [" ".join(parts), _spikes(diagnosis), _validation(diagnosis.validation), _trend(diagnosis.trend)]


def _course(course: Course | None) -> str:
    if course is None:
        return "Too few steps to compare the end with the start."
    start = "the untrained model's validation loss" if course.start_of == "validation" else "the first update's loss"
    side = "above" if course.change > 0 else "below"
    times = course.change + 1
    far = f"{times:,.0f} times" if times >= MANY else f"{abs(course.change):.1%} {side}"
    losses = f"{course.end_loss:.4f} at the end, {far} {start} ({course.start_loss:.4f})"
    peak = f"highest at about step {course.peak_step:,} with {course.peak_loss:.4f}"
    return {
        "diverged": f"Diverged: {losses}; the training loss was {peak}.",
        "unstable": f"Became unstable: {_rise_again(course)}; {losses}.",
        "recovered": f"The training loss rose before it fell: {peak}; {losses}.",
        "unchanged": f"Not clearly better than untrained: {losses}.",
    }.get(course.verdict, f"Learned: {losses}.")


def _rise_again(course: Course) -> str:
    times = course.trained_loss / course.lowest_loss if course.lowest_loss else MANY
    higher = f"{times:,.0f} times" if times >= MANY else f"{times - 1:.0%} above"
    lowest = f"its lowest of about step {course.lowest_step:,} ({course.lowest_loss:.4f})"
    return f"the training loss ended at {course.trained_loss:.4f}, {higher} {lowest}"


def _jumps(jumps: NormJumps) -> str:
    return (
        f"Training was not stable: the gradient's norm changed by a factor of about {jumps.factor:.2g} from one update "
        f"to the next, between {jumps.lowest:.2g} and {jumps.highest:.2g}."
    )


_ADVICE = {
    "learning rate": "the learning rate is too high; try a third of it, or a longer warm-up",
    "rows": "the rows of that window",
    "overflow": "overflow of fp16; try training.precision=bf16 where the GPU has it, or a lower learning rate",
}


def _cause(cause: Cause) -> str:
    return f"Likely cause: {_ADVICE[cause.kind]} ({'; '.join(cause.evidence)})."


def _spikes(diagnosis: Diagnosis) -> str:
    early, later = ([spike for spike in diagnosis.spikes if spike.early is at_start] for at_start in (True, False))
    said = [_early(early, diagnosis.cause)] if early else []
    if later or not early or early[-1].recovered:
        said.append(_later(later))
    return " ".join(said)


def _early(spikes: Sequence[Spike], told: Cause | None) -> str:
    """Rises within the first twenty steps; a cause that was ``told`` of the whole course is not told again."""
    worst = max(spikes, key=_times)
    rise = f"from {worst.typical_loss:.4f} to {worst.loss:.4f} at step {worst.step:,}, {_multiple(_times(worst))}"
    over = f"over after step {worst.last_step:,}" if worst.recovered else "it never came back"
    more = f", the worst of {len(spikes)} rises" if len(spikes) > 1 else ""
    known = worst.cause is None or (told is not None and told.kind == worst.cause.kind)
    cause = "" if known or worst.cause is None else f" {_cause(worst.cause)}"
    return f"The training loss rose within the first twenty steps{more}: {rise}; {over}.{cause}"


def _times(spike: Spike) -> float:
    return spike.loss / spike.typical_loss if spike.typical_loss else 0.0


def _multiple(times: float) -> str:
    return f"{times:,.0f} times as high" if times >= MANY else f"{times:.1f} times as high"


def _later(spikes: Sequence[Spike]) -> str:
    if not spikes:
        return "No spikes of the training loss after the first twenty steps."
    worst = max(spikes, key=_times)
    open_end = "" if spikes[-1].recovered else "; the loss never came back from the last one"
    return (
        f"{len(spikes)} spike{'s' * (len(spikes) > 1)} of the training loss, the worst at step {worst.step:,}: "
        f"{worst.loss:.4f} where {worst.typical_loss:.4f} was usual{open_end}."
    ) + ("" if worst.cause is None else f" {_cause(worst.cause)}")


def cause_of_spike(spike: Spike) -> str:
    """The likely cause in a cell of a table."""
    return "" if spike.cause is None else f"{spike.cause.kind}: {'; '.join(spike.cause.evidence)}"


def _validation(validation: Validation | None) -> str:
    if validation is None:
        return "Over-fitting cannot be judged with fewer than two evaluations."
    last, gap = "the last one", f"{validation.gap_at_end:+.4f}"
    if validation.rise:
        last = f"{validation.last_loss:.4f} ({_change(validation.rise)}) at the end"
        if validation.verdict in ("no over-fitting", "not clear") and validation.rise > RISE:
            last += _doubt(validation)
        gap = f"{validation.gap_at_turn:+.4f} there and {gap} at the end"
    verdict = {
        "over-fitting": f"Over-fitting since epoch {validation.turned_epoch}",
        "rising": "The validation loss rose, but not by over-fitting, since the training loss did not fall",
        "not clear": "Whether it over-fits is not clear",
    }.get(validation.verdict, "No over-fitting")
    return (
        f"{verdict}: validation loss lowest at step {validation.turned_step:,} (epoch {validation.turned_epoch}) with "
        f"{validation.lowest_loss:.4f}, {last}; gap to the training loss {gap}."
    )


def _change(share: float) -> str:
    """``+12.3%``, or ``to 1,234 times``."""
    return f"to {share + 1:,.0f} times" if share + 1 >= MANY else f"{share:+.1%}"


def _doubt(validation: Validation) -> str:
    """Why a rise is not called one."""
    if validation.noise is None or validation.rise > DEVIATIONS * validation.noise:
        return ", which the last evaluation alone shows"
    return f", where one evaluation varies by {validation.noise:.1%} (its standard deviation)"


def _trend(trend: Trend | None) -> str:
    if trend is None:
        return "Too few steps to tell whether the loss still falls."
    verdict = {
        "falling": "The training loss still falls",
        "rising": "The training loss rises",
        "plateau": "Plateau of the training loss",
    }.get(trend.verdict, "Whether the training loss still falls is lost in its noise")
    interval = f"{_change(trend.lowest)} to {_change(trend.highest).removeprefix('to ')}"
    change = f"{_change(trend.change)} (95% interval {interval})"
    where = f"from step {trend.first_step:,} to step {trend.last_step:,}, the last third"
    return f"{verdict}: {change} {where}, around {trend.median_loss:.4f}."
