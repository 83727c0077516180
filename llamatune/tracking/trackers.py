"""Sends the metrics of a run to its trackers, each in a thread. A tracker that fails costs one warning, not the run.

The lasting record of a run is ``metrics.jsonl``. Each process first copies the lines that a tracker lacks from there.
So a tracker has every step once, also after kills, and can be turned on at any time.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from llamatune.errors import EnvironmentFault
from llamatune.events import EvalDone, Event, Notice, OnEvent, RunStarted, StepDone
from llamatune.formats.metrics import read_lines
from llamatune.formats.metrics_lines import check_line, parse_line
from llamatune.spec import RunSpec
from llamatune.training.run_file_names import METRICS
from llamatune.units import perplexity

_BACKLOG = 10_000
"""With more lines waiting than this, a tracker has failed."""
_CLOSING_S = 30.0
"""Seconds that all trackers together may take to close after the run."""
_KEYS = {
    "step": {
        "train/loss": "loss",
        "train/learning_rate": "learning_rate",
        "train/grad_norm": "grad_norm",
        "train/tokens_per_second": "tokens_per_second",
    },
    "eval": {"eval/loss": "loss", "eval/perplexity": "perplexity"},
}

Line = Mapping[str, Any]
"""A line of ``metrics.jsonl``."""


class Tracker(Protocol):
    """A receiver of one run's metrics. Any method may raise or hang."""

    next_step: int
    """The first step that it does not have yet."""

    def log(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        """Add the values of ``step``, recorded at ``time_s`` (seconds since 1970)."""

    def close(self, exit_code: int) -> None:
        """Flush and end; ``exit_code`` is the run's."""


def scalars(line: Line) -> dict[str, float]:
    """The values that trackers get of a line; none for most kinds of lines."""
    values = {name: line[key] for name, key in _KEYS.get(line["event"], {}).items()}
    if line["event"] == "step":
        values["train/perplexity"] = perplexity(line["loss"])
    return values


class Trackers:
    """The trackers that the spec turns on, from the start of a run to the end of a ``with`` block.

    Args:
        report: receives every event, and a warning for each tracker that failed.

    Raises:
        EnvironmentFault: a tracker's package is not installed.
    """

    def __init__(self, spec: RunSpec, report: OnEvent) -> None:
        self._run, self._report = Path(spec.training.output_dir), report
        self._openers: dict[str, Callable[[], Tracker]] = {}
        self._workers: list[_Worker] = []
        if spec.tracking.tensorboard:
            _require("tensorboard")
            from llamatune.tracking.tensorboard import TensorBoardTracker

            self._openers["TensorBoard"] = lambda: TensorBoardTracker(self._run)
        if spec.tracking.wandb is not None:
            _require("wandb")
            from llamatune.tracking.weights_and_biases import WandbTracker

            self._openers["W&B"] = lambda: WandbTracker(spec, self._run)

    def on_event(self, event: Event) -> None:
        """Pass an event to ``report`` and queue its values for the trackers."""
        self._report(event)
        match event:
            case RunStarted():
                began_s = time.time() - event.elapsed_s
                self._workers = [_Worker(*opener, self._run / METRICS, began_s) for opener in self._openers.items()]
            case StepDone() | EvalDone():
                for worker in self._workers:
                    worker.send({"event": event.event, **vars(event)})
                self._warn()

    def _warn(self) -> None:
        for worker in self._workers:
            if worker.fault is not None and not worker.warned:
                worker.warned = True
                self._report(Notice(f"no longer tracking with {worker.name}: {worker.fault}", "warning"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, fault: BaseException | None, traceback: object) -> None:
        exit_code = 0 if fault is None else getattr(fault, "exit_code", 1)
        for worker in self._workers:
            worker.send({"event": "end", "exit_code": exit_code})
        deadline = time.monotonic() + _CLOSING_S
        for worker in self._workers:
            worker.wait(deadline - time.monotonic())
        self._warn()


class _Worker:
    """One tracker in a daemon thread."""

    def __init__(self, name: str, opener: Callable[[], Tracker], metrics: Path, began_s: float) -> None:
        self.name, self._opener, self._metrics, self._began_s = name, opener, metrics, began_s
        self._recorded = metrics.stat().st_size
        self.fault: str | None = None
        """Why it failed."""
        self.warned = False
        self._lines: queue.Queue[Line] = queue.Queue(_BACKLOG)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def send(self, line: Line) -> None:
        if self.fault is None:
            try:
                self._lines.put_nowait(line)
            except queue.Full:
                self.fault = f"it is {_BACKLOG:,} lines behind"

    def wait(self, seconds: float) -> None:
        self._thread.join(max(seconds, 0.0))
        if self._thread.is_alive() and self.fault is None:
            self.fault = f"it did not end within {_CLOSING_S:g} s"

    def _work(self) -> None:
        try:
            tracker, exit_code = self._opener(), 1
            try:
                exit_code = self._copy(tracker)
            except BaseException as fault:
                self._note(fault)
            tracker.close(exit_code)
        except BaseException as fault:
            self._note(fault)

    def _note(self, fault: BaseException) -> None:
        what = f"{type(fault).__name__}: {fault}"
        if key := os.environ.get("WANDB_API_KEY"):
            what = what.replace(key, "***")
        self.fault = self.fault or " ".join(what.split()).removesuffix(":")

    def _copy(self, tracker: Tracker) -> int:
        """Log every line until the end of the run, and return its exit code."""
        elapsed_s = 0.0
        for line in self._all_lines():
            if line["event"] == "end":
                return int(line["exit_code"])
            values, elapsed_s = scalars(line), line.get("elapsed_s", elapsed_s)
            if values and line["step"] >= tracker.next_step:
                tracker.log(values, line["step"], self._began_s + elapsed_s)
        return 1

    def _all_lines(self) -> Iterator[Line]:
        """What was recorded before this process went on with the run, then what it tells."""
        for _, end, text in read_lines(self._metrics):
            if end > self._recorded:
                break
            yield check_line(parse_line(text))
        while self.fault is None:
            yield self._lines.get()


def _require(package: str) -> None:
    module = importlib.util.find_spec(package)
    if module is None or module.origin is None:  # a folder of that name is no package
        install = f"pip install {package}, or leave it out"
        raise EnvironmentFault(f"{package} is not installed", f"tracking.{package}", install)
