"""Over-fitting of a run, and all findings together: the end against the start, spikes, validation, trend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llamatune.events import EvalDone, Step
from llamatune.reporting.averages import epoch_of, mean_loss
from llamatune.reporting.causes import cause_of_course, with_causes
from llamatune.reporting.divergence import Course, judge_course
from llamatune.reporting.run_reader import Run
from llamatune.reporting.spikes import Cause, Spike, find_spikes, robust_deviation, with_rows
from llamatune.reporting.trend import Trend, judge_trend

# Validation losses come from the same rows each time; a rise of less than 1 % above the lowest changes no answer. If
# they are noisy (few rows), the rise must also exceed this many deviations of their own noise, and measuring that noise
# takes some evaluations.
OVERFIT_RISE, OVERFIT_DEVIATIONS, OVERFIT_FEWEST = 0.01, 5.0, 8
# The rise must hold for the last two evaluations, if there are two after the lowest.
OVERFIT_LAST = 2


@dataclass(frozen=True)
class Validation:
    """Whether the validation loss rose after its lowest point.

    ``verdict`` is ``over-fitting`` (it rose while the training loss fell), ``rising`` (both rose) or
    ``no over-fitting``. A gap is the validation loss minus the mean training loss since the evaluation before.
    ``rise`` is relative, from the lowest to the last.
    """

    verdict: str
    turned_step: int
    turned_epoch: int
    lowest_loss: float
    last_loss: float
    rise: float
    gap_at_turn: float
    gap_at_end: float


@dataclass(frozen=True)
class Diagnosis:
    """All findings; None where there is too little data. ``cause`` is the likely one of a course upwards."""

    course: Course | None
    cause: Cause | None
    spikes: list[Spike]
    validation: Validation | None
    trend: Trend | None


def diagnose(steps: Sequence[Step], evaluations: Sequence[EvalDone], at_start: EvalDone | None = None) -> Diagnosis:
    """The findings about a log without causes; ``at_start`` is the evaluation before the first step."""
    spikes, course = find_spikes(steps), judge_course(steps, evaluations, at_start)
    return Diagnosis(course, None, spikes, judge_validation(steps, evaluations), judge_trend(steps, spikes))


def diagnose_run(run: Run) -> Diagnosis:
    """All findings about a run, with the rows of its spikes where they are known, and likely causes."""
    metrics = run.metrics
    found = diagnose(metrics.steps, metrics.evaluations, metrics.at_start)
    cause = cause_of_course(metrics, found.course, run.spec.training.max_grad_norm)
    return replace(found, cause=cause, spikes=with_causes(with_rows(run, found.spikes), metrics))


def _evaluation_noise(losses: Sequence[float]) -> float:
    """The standard deviation of one evaluation, from third differences, which are zero on any parabola."""
    runs_of_four = [losses[start : start + 4] for start in range(len(losses) - 3)]
    thirds = [a - 3 * b + 3 * c - d for a, b, c, d in runs_of_four]
    # The variance of a third difference is 20 times that of one error: 1 + 9 + 9 + 1.
    return robust_deviation(thirds, 0.0) / math.sqrt(20) if len(losses) >= OVERFIT_FEWEST else 0.0


def judge_validation(steps: Sequence[Step], evaluations: Sequence[EvalDone]) -> Validation | None:
    """Over-fitting, judged by the evaluations; None with fewer than two of them."""
    if len(evaluations) < 2 or not steps:
        return None
    losses = [evaluation.loss for evaluation in evaluations]
    turn = losses.index(min(losses))
    lowest, after = losses[turn], losses[turn + 1 :]

    def train_loss(index: int) -> float:
        since = evaluations[index - 1].step if index else 0
        return mean_loss([step for step in steps if since < step.step <= evaluations[index].step])

    needed = max(OVERFIT_RISE * abs(lowest), OVERFIT_DEVIATIONS * _evaluation_noise(losses))
    rose = bool(after) and min(after[-OVERFIT_LAST:]) > lowest + needed
    at_turn, at_end = train_loss(turn), train_loss(len(losses) - 1)
    verdict = "no over-fitting" if not rose else "over-fitting" if at_end < at_turn else "rising"
    turned = next((step for step in steps if step.step >= evaluations[turn].step), steps[-1])
    rise = losses[-1] / lowest - 1 if lowest else 0.0
    return Validation(
        verdict, evaluations[turn].step, epoch_of(turned), lowest, losses[-1], rise,
        gap_at_turn=lowest - at_turn, gap_at_end=losses[-1] - at_end,
    )  # fmt: skip
