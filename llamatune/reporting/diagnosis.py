"""All findings about a run together: the end against the start, spikes, over-fitting, trend, likely causes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llamatune.events import EvalDone, Step
from llamatune.reporting.causes import cause_of_course, with_causes
from llamatune.reporting.divergence import Course, judge_course
from llamatune.reporting.over_fitting import Validation, judge_validation
from llamatune.reporting.run_reader import Run
from llamatune.reporting.spikes import Cause, Spike, find_spikes, with_rows
from llamatune.reporting.trend import Trend, judge_trend


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
