"""Likely causes of spikes and divergence: the learning rate, rows of one window, fp16 overflow; with the evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from llamatune.events import Step
from llamatune.formats.metrics import Metrics
from llamatune.reporting.divergence import Course
from llamatune.reporting.spikes import Cause, Spike

# fp16's scale is halved until the gradient is finite: some windows at the beginning are usual. Trouble is this share of
# all windows, or a scale below one, where small gradients become zero.
OVERFLOW_SHARE, OVERFLOW_SCALE, OVERFLOW_FEWEST = 0.05, 1.0, 3
# A window that was skipped so shortly before a spike belongs to it.
OVERFLOW_BEFORE = 5
# A batch of unusual rows is over after one update, or two where Adam's averages carry it on. What lasts longer is in
# the weights.
ROWS_LAST = 2
_START = 5
"""Updates whose gradient norms are those of the start."""
_MOST_ROWS = 8


def cause_of_course(metrics: Metrics, course: Course | None, max_grad_norm: float | None) -> Cause | None:
    """Why a run diverged, or rose before it fell; None of another one."""
    if course is None or course.verdict not in ("diverged", "recovered"):
        return None
    steps = metrics.steps
    skipped, windows = metrics.skipped, len(steps) + len(metrics.skipped)
    lowest = min((skip.loss_scale for skip in skipped), default=1.0)
    if len(skipped) >= OVERFLOW_FEWEST and (len(skipped) > OVERFLOW_SHARE * windows or lowest < OVERFLOW_SCALE):
        said = f"{len(skipped):,} of {windows:,} windows were skipped, down to a scale of {lowest:g}"
        return Cause("overflow", [said])
    peak = next(step for step in steps if step.step >= course.peak_step)
    since = course.left_step or peak.step
    left = next(step for step in steps if step.step >= since)
    evidence = [f"the loss was far above its start from step {left.step:,}, at a rate of {left.learning_rate:.3g}"]
    if course.left_step is None:
        evidence = [f"the highest loss, {course.peak_loss:.4f}, was about step {peak.step:,}, "
                    f"at a rate of {peak.learning_rate:.3g}"]  # fmt: skip
    before = median(step.grad_norm for step in steps[:_START])
    around = median(step.grad_norm for step in steps if abs(step.step - peak.step) <= _START)
    evidence.append(f"the gradient's norm was {before:.3g} at the start and {around:.3g} about the peak")
    evidence += _clipped(steps, max_grad_norm)
    return Cause("learning rate", evidence)


def _clipped(steps: Sequence[Step], max_grad_norm: float | None) -> list[str]:
    if max_grad_norm is None:
        return ["the gradient is not clipped"]
    share = sum(step.grad_norm > max_grad_norm for step in steps) / len(steps)
    return [f"{share:.0%} of the updates were clipped to {max_grad_norm:g}"]


def with_causes(spikes: Sequence[Spike], metrics: Metrics) -> list[Spike]:
    """``spikes``, whose rows are named where they can be, with the likely cause of each."""
    counts = Counter(row for spike in spikes for row in set(spike.rows or ()))
    return [replace(spike, cause=_cause_of_spike(spike, metrics, counts)) for spike in spikes]


def _cause_of_spike(spike: Spike, metrics: Metrics, counts: Counter[int]) -> Cause:
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
    return Cause("learning rate", [f"it {end}", norms, rate])
