"""``metrics.jsonl``, the log of a run: its writer and its readers.

Its records are events of the run (``events.py``). A line is one strict-JSON object, ``{"event": KIND, ...}``. Kinds
that this version does not know are passed over. The log has no header: a log of another schema begins with
``{"event": "schema", "version": N}``, which is refused here.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from llamatune.durable_writing import disk_faults, open_own
from llamatune.errors import CheckpointError, printable
from llamatune.events import EarlyStop, EvalDone, Step, StepSkipped
from llamatune.formats.manifest import OtherVersion
from llamatune.safe_reading import open_regular
from llamatune.strict_json import parse_json

SCHEMA = 1
LARGEST_NUMBER = 1e100
"""Far above any real figure, so that products and axis limits stay finite."""
_LARGEST_WHOLE = 1 << 53
"""Below it every whole number is exact as a float."""
LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class LayerGradNorms:
    """The norm of each layer's gradient in one update, by the layer's name."""

    event: ClassVar[str] = "layer_grad_norms"
    step: int
    norms: Mapping[str, float]


Record = Step | EvalDone | StepSkipped | LayerGradNorms | EarlyStop
_Flat = TypeVar("_Flat", Step, EvalDone, StepSkipped)
_FIELDS = {kind.event: fields(kind) for kind in (Step, EvalDone, StepSkipped, LayerGradNorms, EarlyStop)}
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
            _add(metrics, values)
        except ValueError as reason:
            raise CheckpointError(str(reason), f"{path}:{number}", "was it edited?") from None
    metrics.torn = fault is not None
    return metrics


def loss_at_start(path: Path) -> float | None:
    """The validation loss before the first step, with which a log begins; None: it begins with something else."""
    with contextlib.suppress(ValueError):
        _, _, line = next(read_lines(path), (0, 0, b""))
        values = parse_line(line)
        if values.get("event") == EvalDone.event and values.get("step") == 0:
            return _checked(EvalDone, values).loss
    return None


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


def parse_line(line: bytes) -> dict[str, Any]:
    """The object of a line; ``ValueError`` if it is not one whole line of strict JSON."""
    values = parse_json(line)
    if not line.endswith(b"\n") or not isinstance(values, dict):
        raise ValueError("not a line with one object")
    return values


def _add(metrics: Metrics, values: Mapping[str, Any]) -> None:
    last_step = metrics.steps[-1].step if metrics.steps else 0
    match values.get("event"):
        case Step.event:
            step = _checked(Step, values)
            if step.step <= last_step or step.target_tokens < 1:
                raise ValueError(f"no step that can follow step {last_step}")
            metrics.steps.append(step)
        case EvalDone.event:
            evaluation = _checked(EvalDone, values)
            if evaluation.step != last_step or (metrics.evaluations and metrics.evaluations[-1].step == last_step):
                raise ValueError(f"no evaluation that can follow step {last_step}")
            if evaluation.step:
                metrics.evaluations.append(evaluation)
            elif metrics.at_start is not None:
                raise ValueError("a second evaluation before the first step")
            else:
                metrics.at_start = evaluation
        case StepSkipped.event:
            metrics.skipped.append(_checked(StepSkipped, values))
        case LayerGradNorms.event:
            norms = values.get("norms")
            if not isinstance(norms, dict) or not norms:
                raise ValueError("'norms' holds no norm")
            by_layer = {sys.intern(printable(name)): _number(norms, name, whole=False) for name in norms}
            metrics.layer_grad_norms[_number(values, "step", whole=True)] = by_layer


def _checked(kind: type[_Flat], values: Mapping[str, Any]) -> _Flat:
    needed = [entry for entry in fields(kind) if entry.default is MISSING]
    return kind(**{entry.name: _number(values, entry.name, whole=entry.type == "int") for entry in needed})


def _number(values: Mapping[str, Any], name: str, whole: bool) -> Any:
    """One value of a line; ``ValueError`` if it is no number that a run can have logged."""
    value = values.get(name)
    if not isinstance(value, int if whole else int | float) or isinstance(value, bool):
        raise ValueError(f"{name!r} is not a {'whole ' if whole else ''}number")
    if not abs(value) < (_LARGEST_WHOLE if whole else LARGEST_NUMBER):
        raise ValueError(f"{name!r} is too large")
    return value
