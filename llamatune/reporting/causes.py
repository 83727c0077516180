"""Likely causes of spikes and divergence: the learning rate, rows of one window, fp16 overflow; with the evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from llamatune.events import Step
from llamatune.formats.metrics import Metrics
from llamatune.reporting.divergence import Course
from llamatune.reporting.norm_jumps import NormJumps
from llamatune.reporting.spikes import EARLY_STEPS, Cause, Spike
from llamatune.spec import RunSpec
from llamatune.spec_sections import TrainingSection

# fp16's scale is halved until the gradient is finite: some windows at the beginning are usual. Trouble is this share of
# all windows, or a scale below one, where small gradients become zero.
OVERFLOW_SHARE, OVERFLOW_SCALE, OVERFLOW_FEWEST = 0.05, 1.0, 3
# A window that was skipped so shortly before a spike belongs to it.
OVERFLOW_BEFORE = 5
# A batch of unusual rows is over after one update, or two where Adam's averages carry it on. What lasts longer is in
# the weights.
ROWS_LAST = 2
_START = 5
"""Updates whose gradient norms are those of the start, and on either side those about a step."""
_MOST_ROWS = 8


def cause_of_course(metrics: Metrics, course: Course | None, jumps: NormJumps | None, spec: RunSpec) -> Cause | None:
    """Why a run diverged, became unstable, rose before it fell, or has norms that jump; None of another one."""
    troubled = course is not None and course.verdict in ("diverged", "unstable", "recovered")
    if course is None or not (troubled or jumps is not None):
        return None
    steps = metrics.steps
    skipped, windows = metrics.skipped, len(steps) + len(metrics.skipped)
    lowest = min((skip.loss_scale for skip in skipped), default=1.0)
    if len(skipped) >= OVERFLOW_FEWEST and (len(skipped) > OVERFLOW_SHARE * windows or lowest < OVERFLOW_SCALE):
        said = f"{len(skipped):,} of {windows:,} windows were skipped, down to a scale of {lowest:g}"
        return Cause("overflow", [said])
    highest = f"the highest rate was {max(step.learning_rate for step in steps):.3g}"
    evidence = _of_course(steps, course, spec) if troubled else [highest]
    return Cause("learning rate", [*evidence, *_clipped(steps, spec.training.max_grad_norm)])


def _of_course(steps: Sequence[Step], course: Course, spec: RunSpec) -> list[str]:
    """The rate where the loss began to rise, and the gradient's norm before and at the worst."""
    peak = _step_at(steps, course.peak_step)
    if course.verdict == "unstable" and course.rose_step is not None:
        rose = _step_at(steps, course.rose_step)
        began = f"the loss was well above its lowest from step {rose.step:,}, at a rate of {rose.learning_rate:.3g}"
        before, worst = _norm_about(steps, course.lowest_step), _norm_about(steps, steps[-1].step)
        norms = f"the gradient's norm was {before:.3g} about the lowest loss and {worst:.3g} at the end"
        order = [] if spec.data.shuffle else ["the rows came in the file's order, in which later ones may be harder"]
        return [began, norms, *order]
    left = peak if course.left_step is None else _step_at(steps, course.left_step)
    began = f"the loss was far above its start from step {left.step:,}, at a rate of {left.learning_rate:.3g}"
    if course.left_step is None:
        began = f"the highest loss, {course.peak_loss:.4f}, was about step {peak.step:,}, "
        began += f"at a rate of {peak.learning_rate:.3g}"
    before, worst = median(step.grad_norm for step in steps[:_START]), _norm_about(steps, peak.step)
    norms = f"the gradient's norm was {before:.3g} at the start and {worst:.3g} about the peak"
    return [began, norms, *(_warmup(spec.training) if left.step <= EARLY_STEPS else [])]


def _step_at(steps: Sequence[Step], number: int) -> Step:
    return next(step for step in steps if step.step >= number)


def _norm_about(steps: Sequence[Step], number: int) -> float:
    return median(step.grad_norm for step in steps if abs(step.step - number) <= _START)


def _warmup(training: TrainingSection) -> list[str]:
    return [] if training.warmup_steps or training.warmup_ratio else ["there is no warm-up"]


def _clipped(steps: Sequence[Step], max_grad_norm: float | None) -> list[str]:
    if max_grad_norm is None:
        return ["the gradient is not clipped"]
    share = sum(step.grad_norm > max_grad_norm for step in steps) / len(steps)
    return [f"{share:.0%} of the updates were clipped to {max_grad_norm:g}"]


def with_causes(spikes: Sequence[Spike], metrics: Metrics, training: TrainingSection) -> list[Spike]:
    """``spikes``, whose rows are named where they can be, with the likely cause of each."""
    counts = Counter(row for spike in spikes for row in set(spike.rows or ()))
    return [replace(spike, cause=_cause_of_spike(spike, metrics, training, counts)) for spike in spikes]


def _cause_of_spike(spike: Spike, metrics: Metrics, training: TrainingSection, counts: Counter[int]) -> Cause:
    windows = [step.window for step in metrics.steps if step.step == spike.first_step]
    begin = windows[0] if windows else spike.window
    near = [skip for skip in metrics.skipped if begin - OVERFLOW_BEFORE <= skip.window <= spike.window]
    if near:
        said = f"{len(near):,} of the windows just before were skipped, the last at a scale of {near[-1].loss_scale:g}"
        return Cause("overflow", [said])
    lasted = spike.last_step - spike.first_step + 1
    if spike.recovered and lasted <= ROWS_LAST:
        evidence = [f"it was over after {lasted} update{'s' * (lasted > 1)}"]
        again = sorted(row for row in set(spike.rows or ()) if counts[row] > 1)
        if again:
            more = f" and {len(again) - _MOST_ROWS} more" if len(again) > _MOST_ROWS else ""
            named = ", ".join(map(str, again[:_MOST_ROWS])) + more
            evidence.append(f"row{'s' * (len(again) > 1)} {named}: in the windows of other spikes too")
        return Cause("rows", evidence)
    norms = f"the gradient's norm was {spike.grad_norm:.3g} where {spike.typical_grad_norm:.3g} was usual"
    end = "did not end" if not spike.recovered else f"lasted {lasted:,} updates"
    highest = max(step.learning_rate for step in metrics.steps)
    rate = f"the rate was {spike.learning_rate:.3g}, {spike.learning_rate / highest:.0%} of its highest"
    early = [*_warmup(training), *_clipped(metrics.steps, training.max_grad_norm)] if spike.early else []
    return Cause("learning rate", [f"it {end}", norms, rate, *early])
