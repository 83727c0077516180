"""``metrics.jsonl``, the log of a run: its writer and its readers.

Its records are events of the run (``events.py``). A line is one strict-JSON object, ``{"event": KIND, ...}``, with the
keys and values of its kind. Kinds that this version does not know are passed over. The log has no header: a log of
another schema begins with ``{"event": "schema", "version": N}``, which is refused here.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_args

from llamatune.durable_writing import disk_faults
from llamatune.errors import CheckpointError, printable
from llamatune.events import Answer, EarlyStop, EpochMeans, EvalDone, RateSearch, Step, StepSkipped
from llamatune.formats.manifest import OtherVersion
from llamatune.formats.metrics_lines import check_line, parse_line
from llamatune.formats.state_json import ClosedEpoch, SavedState
from llamatune.safe_reading import open_own, open_regular

SCHEMA = 1
LONGEST_LINE = 1 << 20
KEPT_EPOCHS = 1000
"""The last epochs, which the summary of a run holds; the log has all of them."""


@dataclass(frozen=True)
class LayerGradNorms:
    """The norm of each layer's gradient in one update, by the layer's name."""

    event: ClassVar[str] = "layer_grad_norms"
    step: int
    norms: Mapping[str, float]


Record = Step | EvalDone | StepSkipped | EpochMeans | LayerGradNorms | Answer | EarlyStop | RateSearch
_FIELDS = {kind.event: fields(kind) for kind in get_args(Record)}
"""What a line of each kind holds, in its order."""


class MetricsLog:
    """The log while its run appends to it. A failed write is an ``EnvironmentFault`` that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_faults(path):
            self._file = os.fdopen(open_own(path, os.O_RDWR | os.O_APPEND), "ab")

    def append(self, record: Record) -> None:
        values = {entry.name: getattr(record, entry.name) for entry in _FIELDS[record.event]}
        line = json.dumps({"event": record.event, **values}, allow_nan=False).encode() + b"\n"
        with disk_faults(self.path, len(line)):
            self._file.write(line)
            self._file.flush()

    def sync(self) -> int:
        """Make the log durable; its length in bytes."""
        with disk_faults(self.path):
            os.fsync(self._file.fileno())
            return self._file.tell()

    def cut(self, length: int) -> None:
        """Cut the log to its length at the checkpoint that the run resumes from."""
        if length > self._file.tell():
            what = "shorter than its last checkpoint says"
            raise CheckpointError(what, self.path, "was it edited? start again elsewhere")
        with disk_faults(self.path):
            self._file.truncate(length)
            self._file.seek(length)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a failed write has already raised
            self._file.close()


@dataclass
class Metrics:
    """All records of a log; ``torn`` says that its last line is not whole.

    ``at_start`` is the evaluation before the first step, which is none of ``evaluations``.
    """

    at_start: EvalDone | None = None
    steps: list[Step] = field(default_factory=list)
    evaluations: list[EvalDone] = field(default_factory=list)
    skipped: list[StepSkipped] = field(default_factory=list)
    layer_grad_norms: dict[int, dict[str, float]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    rate_search: RateSearch | None = None
    torn: bool = False

    @property
    def all_evaluations(self) -> list[EvalDone]:
        return self.evaluations if self.at_start is None else [self.at_start, *self.evaluations]


def read_metrics(path: Path) -> Metrics:
    """Every record of a log. A last line that is not whole is left out: a run may be writing it, or was killed.

    Raises:
        CheckpointError: a line but the last is broken, a value is no number, or steps do not rise.
    """
    metrics, fault = Metrics(), None
    for number, _, line in read_lines(path):
        if fault is not None:
            raise fault
        try:
            values = parse_line(line)
        except ValueError as reason:
            fault = CheckpointError(f"not valid JSON: {reason}", f"{path}:{number}", "was it edited?")
            continue
        try:
            _add(metrics, check_line(values))
        except ValueError as reason:
            raise CheckpointError(str(reason), f"{path}:{number}", "was it edited?") from None
    metrics.torn = fault is not None
    return metrics


def loss_at_start(path: Path) -> float | None:
    """The validation loss before the first step, with which a log begins; None: it begins with something else.

    Only the search for the learning rate comes before it.
    """
    with contextlib.suppress(ValueError):
        for _, _, line in read_lines(path):
            values = check_line(parse_line(line))
            if values["event"] == EvalDone.event and values["step"] == 0:
                return float(values["loss"])
            if values["event"] != RateSearch.event:
                break
    return None


@dataclass
class Logged:
    """A run by its log, up to a checkpoint: counts, losses of steps, the lowest validation loss, the last epochs."""

    steps: int = 0
    windows: int = 0
    losses: array[float] = field(default_factory=lambda: array("d"))
    best_eval_loss: float | None = None
    epochs: deque[EpochMeans] = field(default_factory=lambda: deque(maxlen=KEPT_EPOCHS))


def read_logged(path: Path, length: int) -> Logged:
    """The first ``length`` bytes of a log, line by line: of each line at most a number stays.

    Raises:
        CheckpointError: a line is broken, a step is missing, or the log is shorter.
    """
    logged, end = Logged(), 0
    for number, end, line in read_lines(path):
        if end > length:
            break
        try:
            values = check_line(parse_line(line))
            _count(logged, values)
        except ValueError as fault:
            raise CheckpointError(str(fault), f"{path}:{number}", "was it edited? start again elsewhere") from None
    if end < length:
        what = "shorter than its last checkpoint says"
        raise CheckpointError(what, path, "was it edited? start again elsewhere")
    return logged


def logged_at(path: Path, saved: SavedState) -> Logged:
    """``read_logged`` up to a checkpoint, whose own counts must be the same.

    Raises:
        CheckpointError: it does not, or the log is broken.
    """
    logged = read_logged(path, saved.metrics_bytes)
    found = {"step": logged.steps, "window": logged.windows, "best_eval_loss": logged.best_eval_loss}
    for name, value in found.items():
        if (known := getattr(saved.position, name)) != value:
            what = f"{name} is {value} where the checkpoint of step {saved.step} has {known}"
            raise CheckpointError(what, path, "was it edited? start again elsewhere")
    return logged


def _count(logged: Logged, values: Mapping[str, Any]) -> None:
    match values["event"]:
        case Step.event:
            logged.steps, logged.windows = logged.steps + 1, logged.windows + 1
            if (values["step"], values["window"]) != (logged.steps, logged.windows):
                found = f"step {values['step']} in window {values['window']}"
                raise ValueError(f"{found} where step {logged.steps} in window {logged.windows} should be")
            logged.losses.append(values["loss"])
        case StepSkipped.event:
            logged.windows += 1
        case EvalDone.event if values["step"]:
            best = logged.best_eval_loss
            logged.best_eval_loss = values["loss"] if best is None else min(best, values["loss"])
        case EpochMeans.event:
            known = ClosedEpoch.model_validate(_record(values))
            logged.epochs.append(EpochMeans(**dict(known)))


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Each line's number from 1, its end in the file, and its bytes; one of more than a MiB comes in pieces.

    Raises:
        OtherVersion: the log is of another schema.
    """
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
            if number == 1 and line.startswith(b'{"event": "schema"'):
                version = None
                with contextlib.suppress(ValueError):
                    version = parse_line(line).get("version")
                if version != SCHEMA:
                    raise OtherVersion(version, path)
            yield number, file.tell(), line


def _add(metrics: Metrics, values: Mapping[str, Any]) -> None:
    last_step = metrics.steps[-1].step if metrics.steps else 0
    match values["event"]:
        case Step.event:
            if values["step"] <= last_step:
                raise ValueError(f"no step that can follow step {last_step}")
            metrics.steps.append(Step(**_record(values)))
        case EvalDone.event:
            evaluation = EvalDone(values["step"], values["loss"])
            if evaluation.step != last_step or (metrics.evaluations and metrics.evaluations[-1].step == last_step):
                raise ValueError(f"no evaluation that can follow step {last_step}")
            if evaluation.step:
                metrics.evaluations.append(evaluation)
            elif metrics.at_start is not None:
                raise ValueError("a second evaluation before the first step")
            else:
                metrics.at_start = evaluation
        case StepSkipped.event:
            metrics.skipped.append(StepSkipped(**_record(values)))
        case RateSearch.event:
            metrics.rate_search = RateSearch(**_record(values))
        case Answer.event:
            metrics.answers.append(Answer(**_record(values)))
        case LayerGradNorms.event:
            norms = values["norms"]
            metrics.layer_grad_norms[values["step"]] = {sys.intern(printable(name)): norms[name] for name in norms}


def _record(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "event"}
