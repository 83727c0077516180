"""A timeline of the first updates after a start, by torch.profiler, for a viewer of Chrome traces."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llamatune.durable_writing import write_atomic
from llamatune.events import Event, Notice, OnEvent, RunStarted, StepDone, StepSkipped
from llamatune.training.run_files import trace_name


class _FirstSteps:
    """Listens to a run: the trace begins when training does and is written once ``steps`` windows have passed."""

    def __init__(self, steps: int, device: torch.device, run: Path, on_event: OnEvent) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profiler = profile(activities=activities)
        self._left, self._run, self._on_event = steps, run, on_event
        self._trace: Path | None = None

    def hear(self, event: Event) -> None:
        self._on_event(event)
        if isinstance(event, RunStarted):
            self._trace = self._run / trace_name(event.resumed_step + 1)
            self._profiler.start()
        elif isinstance(event, StepDone | StepSkipped):
            self._left -= 1
            if self._left == 0:
                self.write()

    def write(self) -> None:
        """End the trace, if one has begun and is not written yet."""
        trace, self._trace = self._trace, None
        if trace is None:
            return
        self._profiler.stop()
        # The exporter writes by name and moves its file into place itself, which tells nothing of the disk.
        with tempfile.TemporaryDirectory(dir=self._run, prefix=".llamatune-trace-") as scratch:
            exported = Path(scratch) / trace.name
            self._profiler.export_chrome_trace(str(exported))
            with exported.open("rb") as source:
                write_atomic(trace, lambda file: shutil.copyfileobj(source, file))
        self._on_event(Notice(f"profiler trace written to {trace}"))


@contextlib.contextmanager
def profiled(steps: int | None, device: torch.device, run: Path, on_event: OnEvent) -> Iterator[OnEvent]:
    """Yield the observer that a run must report to, so that its first ``steps`` windows are traced; None: no trace.

    A run that ends earlier, in whatever way, leaves the trace of what it did.
    """
    if steps is None:
        yield on_event
        return
    first_steps = _FirstSteps(steps, device, run, on_event)
    try:
        yield first_steps.hear
    finally:
        first_steps.write()
