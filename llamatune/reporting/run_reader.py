"""Reads a run directory, finished or not: spec, metrics, summary, data counts, versions, status."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from llamatune.errors import CheckpointError, LlamatuneError, SpecError, printable
from llamatune.files import MANIFEST, digest_bytes, open_regular, parse_json, read_bytes, read_json
from llamatune.spec import RunSpec, load_spec
from llamatune.training.run_files import CHECKPOINTS, METRICS, ORIGIN, SPEC, SUMMARY
from llamatune.training.run_lock import LOCK

_LONGEST_LINE = 1 << 20
_LARGEST_MANIFEST = 16 << 20
_DATA_NAMES = ("format", "template")
_DATA_COUNTS = (
    "max_seq_length", "rows_in", "kept", "truncated", "truncated_tokens", "dropped", "refused", "duplicates"
)  # fmt: skip
_SPLIT_COUNTS = ("rows", "tokens", "target_tokens", "longest_row_tokens")
# Far above any real figure: below the first, products and axis limits stay finite; below the second, floats are exact.
LARGEST_NUMBER, _LARGEST_WHOLE = 1e100, 1 << 53


@dataclass(frozen=True)
class Step:
    """One line of the log for one update, as training wrote it; ``grad_norm`` is from before clipping."""

    step: int
    window: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    loss_scale: float
    target_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    elapsed_s: float


@dataclass(frozen=True)
class Evaluation:
    """The validation loss after ``step`` updates."""

    step: int
    loss: float


@dataclass(frozen=True)
class Skipped:
    """A window whose gradient overflowed fp16, and the loss scale that was set after it."""

    window: int
    loss_scale: float


@dataclass
class Metrics:
    """All of ``metrics.jsonl``; ``torn`` says that its last line is not whole."""

    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    layer_grad_norms: dict[int, dict[str, float]] = field(default_factory=dict)
    torn: bool = False


@dataclass(frozen=True)
class Run:
    """What a run directory and its prepared data contain, without any tensor.

    ``status`` is ``finished``, ``stopped early``, ``running`` or ``unfinished``; ``summary`` is empty until the run has
    ended; ``spec_changes`` are those made between two starts. ``data`` holds the counts of ``prepare-data``, empty if
    the prepared directories were removed or replaced.
    """

    name: str
    path: Path
    spec: RunSpec
    metrics: Metrics
    status: str
    summary: dict[str, Any]
    spec_changes: list[str]
    data: dict[str, int | str]
    versions: dict[str, str]
    traces: list[str]
    notices: list[str]


def read_run(path: Path, name: str) -> Run:
    """Read a run directory.

    Raises:
        CheckpointError: not a run directory, or one of its files is broken.
    """
    if not (path / SPEC).is_file() or not (path / METRICS).is_file():
        what = "not a run directory" if path.exists() else "no such directory"
        raise CheckpointError(what, path, "name a training.output_dir of llamatune train")
    try:
        spec = load_spec(path / SPEC)
    except SpecError as fault:
        raise CheckpointError("not a spec that this version reads", path / SPEC, fault.what) from None
    metrics = read_metrics(path / METRICS)
    summary = read_json(path / SUMMARY) if (path / SUMMARY).is_file() else {}
    origin = read_json(path / ORIGIN) if (path / ORIGIN).is_file() else {}
    data, data_notice = _prepared_counts(spec, origin)
    notices = [
        "the last line of metrics.jsonl is not whole and was left out" if metrics.torn else "",
        "no step is logged yet" if not metrics.steps else "",
        data_notice,
    ]
    return Run(
        name=name,
        path=path,
        spec=spec,
        metrics=metrics,
        status=_status(path, summary),
        summary=summary,
        spec_changes=list(_spec_changes(origin)),
        data=data,
        versions=_versions(path),
        traces=sorted(printable(trace.name) for trace in path.glob("trace-*.json")),
        notices=[notice for notice in notices if notice],
    )


def _number(values: Mapping[str, Any], name: str, whole: bool) -> Any:
    """One value of a line; ``ValueError`` if it is no number that a run can have logged."""
    value = values.get(name)
    if not isinstance(value, int if whole else int | float) or isinstance(value, bool):
        raise ValueError(f"{name!r} is not a {'whole ' if whole else ''}number")
    if not abs(value) < (_LARGEST_WHOLE if whole else LARGEST_NUMBER):
        raise ValueError(f"{name!r} is too large")
    return value


Record = TypeVar("Record", Step, Evaluation, Skipped)


def _record(kind: type[Record], values: Mapping[str, Any]) -> Record:
    return kind(**{wanted.name: _number(values, wanted.name, wanted.type == "int") for wanted in fields(kind)})


def _objects(path: Path, metrics: Metrics) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's number and object. A last line that is not whole is noted: its writer may be at it, or was killed."""
    with open_regular(path) as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            try:
                value = parse_json(line)
                if not line.endswith(b"\n") or not isinstance(value, dict):
                    raise ValueError("not a line with one object")
            except ValueError as fault:
                if not file.read(1):
                    metrics.torn = True
                    return
                raise CheckpointError(f"not valid JSON: {fault}", f"{path}:{number}", "was it edited?") from None
            yield number, value


def _add(metrics: Metrics, values: Mapping[str, Any]) -> None:
    last_step = metrics.steps[-1].step if metrics.steps else 0
    match values.get("event"):
        case "step":
            step = _record(Step, values)
            if step.step <= last_step or step.target_tokens < 1:
                raise ValueError(f"no step that can follow step {last_step}")
            metrics.steps.append(step)
        case "eval":
            evaluation = _record(Evaluation, values)
            if evaluation.step != last_step or (metrics.evaluations and metrics.evaluations[-1].step == last_step):
                raise ValueError(f"no evaluation that can follow step {last_step}")
            metrics.evaluations.append(evaluation)
        case "skipped":
            metrics.skipped.append(_record(Skipped, values))
        case "layer_grad_norms":
            norms = values.get("norms")
            if not isinstance(norms, dict) or not norms:
                raise ValueError("'norms' holds no norm")
            found = {sys.intern(printable(name)): _number(norms, name, whole=False) for name in norms}
            metrics.layer_grad_norms[_number(values, "step", whole=True)] = found


def read_metrics(path: Path) -> Metrics:
    """Read ``metrics.jsonl``; events that this version does not know are passed over.

    Raises:
        CheckpointError: a line but the last is broken, a value is no number, or steps do not rise.
    """
    metrics = Metrics()
    for number, values in _objects(path, metrics):
        try:
            _add(metrics, values)
        except ValueError as fault:
            raise CheckpointError(str(fault), f"{path}:{number}", "was it edited?") from None
    return metrics


def _status(path: Path, summary: Mapping[str, Any]) -> str:
    """Whether the run ended or is running, by its summary and its lock (which a killed run leaves behind)."""
    if summary:
        return "stopped early" if summary.get("stopped_early") else "finished"
    try:
        note = parse_json(read_bytes(path / LOCK))
        elsewhere = note["host"] != socket.gethostname()
        return "running" if elsewhere or Path(f"/proc/{int(note['pid'])}").exists() else "unfinished"
    except (LlamatuneError, ValueError, KeyError, TypeError):
        return "unfinished"


def _manifest_facts(directory: Path, digest: object) -> dict[str, Any]:
    """The manifest of ``directory``; ``ValueError`` if it is gone or not the one that the run read."""
    try:
        raw = read_bytes(directory / MANIFEST, CheckpointError, _LARGEST_MANIFEST)
        facts = parse_json(raw)["facts"]
    except (LlamatuneError, ValueError, KeyError, TypeError):
        raise ValueError(f"the prepared data is not there any more: {printable(str(directory))}") from None
    if digest_bytes(raw) != digest or not isinstance(facts, dict) or not isinstance(facts.get("splits"), dict):
        raise ValueError(f"other data than the run's is there now: {printable(str(directory))}")
    return facts


def _prepared_counts(spec: RunSpec, origin: Mapping[str, Any]) -> tuple[dict[str, int | str], str]:
    """Counts of the prepared data (``train_rows`` and so on), or none and a notice why."""
    try:
        facts = _manifest_facts(Path(spec.data.train), origin.get("train"))
        splits = facts["splits"]
        if spec.data.validation is not None:
            other = _manifest_facts(Path(spec.data.validation), origin.get("validation"))
            splits = {"train": splits.get("train"), "validation": other["splits"].get("train")}
    except ValueError as fault:
        return {}, str(fault)
    template = facts.get("template")
    named = {**facts, "template": template.get("name") if isinstance(template, dict) else None}
    counts: dict[str, int | str]
    counts = {key: printable(value) for key in _DATA_NAMES if isinstance(value := named.get(key), str)}
    counts |= {key: value for key in _DATA_COUNTS if isinstance(value := facts.get(key), int)}
    for name in ("train", "validation"):
        if isinstance(split := splits.get(name), dict):
            counts |= {f"{name}_{key}": value for key in _SPLIT_COUNTS if isinstance(value := split.get(key), int)}
    return counts, ""


def _spec_changes(origin: Mapping[str, Any]) -> Iterator[str]:
    changes = origin.get("spec_changes")
    for change in changes if isinstance(changes, list) else []:
        if isinstance(change, dict):
            yield f"{change.get('field')}: {json.dumps(change.get('old'))} -> {json.dumps(change.get('new'))}"


def _versions(path: Path) -> dict[str, str]:
    """Versions of llamatune and torch, from the newest checkpoint."""
    states = [state for state in path.glob(f"{CHECKPOINTS}/step-*/state.json") if state.parent.name[5:].isdigit()]
    if not states:
        return {}
    try:
        state = read_json(max(states, key=lambda state: int(state.parent.name[5:])))
    except (LlamatuneError, ValueError):  # int() refuses thousands of digits
        return {}
    return {key: printable(state[key]) for key in ("llamatune", "torch") if isinstance(state.get(key), str)}


def name_runs(paths: Sequence[Path]) -> list[str]:
    """A name for each run: its directory's, or the whole path if two directories have the same name.

    Raises:
        SpecError: the same directory is given twice.
    """
    real = [os.path.realpath(path) for path in paths]
    twice = next((path for path, where in zip(paths, real, strict=True) if real.count(where) > 1), None)
    if twice is not None:
        raise SpecError("the same run is given twice", twice, "name each run once")
    short = [Path(where).name for where in real]
    return [printable(name if short.count(name) == 1 else str(path)) for name, path in zip(short, paths, strict=True)]
