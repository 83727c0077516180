"""torch.profiler trace of the first windows after a start, as a Chrome trace in the run directory."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from llamatune.durable_writing import write_atomic
from llamatune.events import AnswersDone, EvalDone, Event, Notice, OnEvent, RunStarted, StepDone, StepSkipped


@contextlib.contextmanager
def profiled(steps: int | None, device: torch.device, run: Path, on_event: OnEvent) -> Iterator[OnEvent]:
    """Yield the observer that a run must report to, so that its first ``steps`` windows are traced; None: no trace.

    A run that ends earlier, also by an error, leaves the trace up to its end.
    """
    if steps is None:
        yield on_event
        return
    windows, waits = itertools.count(1), False
    with contextlib.ExitStack() as tracing:

        def begin(step: int) -> None:
            tracing.enter_context(_traced(run / f"trace-from-step-{step:06d}.json", device, on_event))

        def observe(event: Event) -> None:
            nonlocal waits
            on_event(event)
            if isinstance(event, RunStarted):
                waits = event.evaluates_first
                if not waits:
                    begin(event.resumed_step + 1)
            elif isinstance(event, EvalDone | AnswersDone) and waits:
                waits = False
                begin(1)
            elif isinstance(event, StepDone | StepSkipped) and next(windows) == steps:
                tracing.close()

        yield observe


@contextlib.contextmanager
def _traced(trace: Path, device: torch.device, on_event: OnEvent) -> Iterator[None]:
    profiler = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])])
    try:
        with profiler:
            yield
    finally:
        # The exporter writes to a path and hides the errors of the disk, so its file is copied.
        with tempfile.TemporaryDirectory(dir=trace.parent, prefix=".llamatune-trace-") as scratch:
            exported = Path(scratch) / trace.name
            profiler.export_chrome_trace(str(exported))
            with exported.open("rb") as source:
                write_atomic(trace, lambda file: shutil.copyfileobj(source, file))
        on_event(Notice(f"profiler trace written to {trace}"))
