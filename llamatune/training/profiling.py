"""torch.profiler trace of the first windows after a start, as a Chrome trace in the run directory."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llamatune.events import Event, Notice, OnEvent, RunStarted, StepDone, StepSkipped
from llamatune.files import write_atomic
from llamatune.training.run_files import trace_name


class _FirstSteps:
    """An observer of a run: starts the profiler when training starts, writes the trace after ``steps`` windows."""

    def __init__(self, steps: int, device: torch.device, run: Path, on_event: OnEvent) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profiler = profile(activities=activities)
        self._left, self._run, self._forward = steps, run, on_event
        self._trace: Path | None = None

    def on_event(self, event: Event) -> None:
        self._forward(event)
        if isinstance(event, RunStarted):
            self._trace = self._run / trace_name(event.resumed_step + 1)
            self._profiler.start()
        elif isinstance(event, StepDone | StepSkipped):
            self._left -= 1
            if self._left == 0:
                self.write()

    def write(self) -> None:
        """Stop the profiler and write the trace, if there is one that is not written yet."""
        trace, self._trace = self._trace, None
        if trace is None:
            return
        self._profiler.stop()
        # The exporter writes to a path and hides the errors of the disk, so its file is copied.
        with tempfile.TemporaryDirectory(dir=self._run, prefix=".llamatune-trace-") as scratch:
            exported = Path(scratch) / trace.name
            self._profiler.export_chrome_trace(str(exported))
            with exported.open("rb") as source:
                write_atomic(trace, lambda file: shutil.copyfileobj(source, file))
        self._forward(Notice(f"profiler trace written to {trace}"))


@contextlib.contextmanager
def profiled(steps: int | None, device: torch.device, run: Path, on_event: OnEvent) -> Iterator[OnEvent]:
    """Yield the observer that a run must report to, so that its first ``steps`` windows are traced; None: no trace.

    A run that ends earlier, also by an error, leaves the trace up to its end.
    """
    if steps is None:
        yield on_event
        return
    first_steps = _FirstSteps(steps, device, run, on_event)
    try:
        yield first_steps.on_event
    finally:
        first_steps.write()
