"""All findings about a run together: its course, gradient norms, spikes, over-fitting, trend, likely causes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llamatune.events import EvalDone, Step
from llamatune.reporting.causes import cause_of_course, with_causes
from llamatune.reporting.divergence import Course, judge_course
from llamatune.reporting.norm_jumps import NormJumps, judge_norms
from llamatune.reporting.over_fitting import Validation, judge_validation, without_over_fitting
from llamatune.reporting.run_reader import Run
from llamatune.reporting.spikes import Cause, Spike, find_spikes, with_rows
from llamatune.reporting.trend import Trend, judge_trend


@dataclass(frozen=True)
class Diagnosis:
    """All findings; None where there is too little data. ``cause`` is the likely one of a course upwards and of jumps.

    ``jumps`` of the gradient's norm are None where they are ordinary.
    """

    course: Course | None
    jumps: NormJumps | None
    cause: Cause | None
    spikes: list[Spike]
    validation: Validation | None
    trend: Trend | None


def diagnose(steps: Sequence[Step], evaluations: Sequence[EvalDone], at_start: EvalDone | None = None) -> Diagnosis:
    """The findings about a log without causes; ``at_start`` is the evaluation before the first step."""
    spikes, course = find_spikes(steps), judge_course(steps, evaluations, at_start)
    validation = judge_validation(steps, evaluations)
    if course is not None and course.verdict == "unstable" and validation is not None:
        validation = without_over_fitting(validation)
    # An early spike is no outlier of the last third: where it lasts until then, it is the course.
    trend = judge_trend(steps, [spike for spike in spikes if not spike.early])
    return Diagnosis(course, judge_norms(steps), None, spikes, validation, trend)


def diagnose_run(run: Run) -> Diagnosis:
    """All findings about a run, with the rows of its spikes where they are known, and likely causes."""
    metrics = run.metrics
    found = diagnose(metrics.steps, metrics.evaluations, metrics.at_start)
    cause = cause_of_course(metrics, found.course, found.jumps, run.spec)
    spikes = with_causes(with_rows(run, found.spikes), metrics, run.spec.training)
    return replace(found, cause=cause, spikes=spikes)
