"""The time that a run or a task still takes, from its pace in this process."""

from __future__ import annotations

import time

from llamatune.events import Progress, StepDone


class RunTimeLeft:
    """Seconds to the end of a run, from its pace since the first update of this process, which is slower."""

    def __init__(self) -> None:
        self._first: StepDone | None = None

    def after(self, step: StepDone) -> float | None:
        """None until two updates were made."""
        if step.step >= step.total_steps:
            return 0.0
        if self._first is None:
            self._first = step
        made = step.step - self._first.step
        return (step.elapsed_s - self._first.elapsed_s) / made * (step.total_steps - step.step) if made else None


class TaskTimeLeft:
    """Seconds to the end of each task that reports its progress, from its pace since its first report."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, float]] = {}

    def after(self, progress: Progress) -> float | None:
        """None until a task has moved on from its first report, and where its end is not known."""
        now, share = time.monotonic(), progress.share
        if share is None:
            return None
        if share >= 1:
            self._first.pop(progress.task, None)
            return 0.0
        began, first_share = self._first.setdefault(progress.task, (now, share))
        return (now - began) / (share - first_share) * (1 - share) if share > first_share else None
