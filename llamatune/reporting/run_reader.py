"""Reads a run directory, finished or not: spec, metrics, summary, data counts, versions, status."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError, LlamatuneError, SpecError, printable
from llamatune.formats.lock_note import LARGEST_NOTE, parse_note
from llamatune.formats.manifest import OtherVersion
from llamatune.formats.metrics import Metrics, read_metrics
from llamatune.formats.origin_json import Origin, read_origin
from llamatune.formats.prepared import read_prepared_manifest
from llamatune.formats.state_json import list_checkpoints, read_progress
from llamatune.formats.summary_json import read_summary
from llamatune.safe_reading import read_bytes
from llamatune.spec import RunSpec, load_stored_spec
from llamatune.training.early_stopping import told_stop
from llamatune.training.run_file_names import CHECKPOINTS, METRICS, ORIGIN, SPEC, SUMMARY
from llamatune.training.run_lock import LOCK

_DATA_NAMES = ("format", "template")
_DATA_COUNTS = (
    "max_seq_length", "rows_in", "kept", "truncated", "truncated_tokens", "dropped", "refused", "duplicates"
)  # fmt: skip
_LENGTHS = ("max_seq_length", "longest_row_tokens")
_SPLIT_COUNTS = ("rows", "tokens", "target_tokens", "longest_row_tokens")


@dataclass(frozen=True)
class Run:
    """What a run directory and its prepared data contain, without any tensor.

    ``found`` is the spec with relative paths of the base and of the data as they are from here.

    ``status`` is ``finished``, ``stopped early``, ``running`` or ``unfinished``; ``summary`` is empty until the run has
    ended; ``spec_changes`` are those made between two starts. ``data`` holds the counts of ``prepare-data``, empty if
    the prepared directories were removed or replaced.
    """

    name: str
    path: Path
    spec: RunSpec
    found: RunSpec
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
        spec = load_stored_spec(path / SPEC)
    except SpecError as fault:
        raise CheckpointError("not a spec that this version reads", path / SPEC, fault.what) from None
    metrics = read_metrics(path / METRICS)
    summary = read_summary(path / SUMMARY) if (path / SUMMARY).exists() else {}
    origin = read_origin(path / ORIGIN) if (path / ORIGIN).exists() else None
    if spec.training.learning_rate == "auto" and origin is not None and origin.search is not None:
        spec = spec.with_learning_rate(origin.search.learning_rate)
    found = _from_here(spec, path)
    data, data_notice = _prepared_counts(found, origin)
    notices = [
        "the last line of metrics.jsonl is not whole and was left out" if metrics.torn else "",
        "no step is logged yet" if not metrics.steps else "",
        printable(told_stop(summary)),
        data_notice,
    ]
    return Run(
        name=name,
        path=path,
        spec=spec,
        found=found,
        metrics=metrics,
        status=_status(path, summary),
        summary=summary,
        spec_changes=list(_spec_changes(origin)),
        data=data,
        versions=_versions(path),
        traces=sorted(printable(trace.name) for trace in path.glob("trace-*.json")),
        notices=[notice for notice in notices if notice],
    )


def _from_here(spec: RunSpec, path: Path) -> RunSpec:
    """``spec`` with relative inputs as they are from here, where the directory the run was started in can be told.

    That is what is left of the run's own path without ``training.output_dir``.
    """
    output, real = Path(os.path.normpath(spec.training.output_dir)), Path(os.path.realpath(path))
    depth = len(output.parts)
    if output.is_absolute() or ".." in output.parts or real.parts[-depth:] != output.parts:
        return spec
    started_in = Path(*real.parts[:-depth])

    def located(name: str) -> str:
        return str(started_in / name) if not Path(name).exists() and (started_in / name).exists() else name

    def all_located(names: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        return tuple(map(located, names)) if isinstance(names, tuple) else None if names is None else located(names)

    data = {"train": all_located(spec.data.train), "validation": all_located(spec.data.validation)}
    model = {"path": located(spec.model.path)}
    return spec.model_copy(
        update={"model": spec.model.model_copy(update=model), "data": spec.data.model_copy(update=data)}
    )


def _status(path: Path, summary: Mapping[str, Any]) -> str:
    """Whether the run ended or is running, by its summary and its lock (which a killed run leaves behind)."""
    if summary:
        return "stopped early" if summary.get("stopped_early") else "finished"
    try:
        note = parse_note(read_bytes(path / LOCK, max_bytes=LARGEST_NOTE))
    except LlamatuneError:
        note = None
    if note is None:
        return "unfinished"
    elsewhere = note.host != socket.gethostname()
    return "running" if elsewhere or Path(f"/proc/{note.pid}").exists() else "unfinished"


def _prepared_facts(directories: Sequence[Path], recorded: object) -> list[dict[str, Any]]:
    """The facts of prepared directories; ``ValueError`` if one is gone or not the one that the run read.

    ``recorded``: a run's digest of them, a list if there are several.
    """
    digests = recorded if isinstance(recorded, list) else [recorded]
    found = list[dict[str, Any]]()
    for number, directory in enumerate(directories):
        try:
            manifest = read_prepared_manifest(directory)
        except LlamatuneError:
            raise ValueError(f"the prepared data is not there any more: {printable(str(directory))}") from None
        if [manifest.digest] != digests[number : number + 1] or not isinstance(manifest.facts.get("splits"), dict):
            raise ValueError(f"other data than the run's is there now: {printable(str(directory))}")
        found.append(manifest.facts)
    return found


def _prepared_counts(spec: RunSpec, origin: Origin | None) -> tuple[dict[str, int | str], str]:
    """Counts of the prepared data (``train_rows`` and so on), or none and a notice why."""
    recorded = {} if origin is None else origin.inputs
    try:
        facts = _prepared_facts(spec.data.train_paths, recorded.get("train"))
        splits = {name: [found["splits"].get(name) for found in facts] for name in ("train", "validation")}
        if spec.data.validation is not None:
            others = _prepared_facts(spec.data.validation_paths, recorded.get("validation"))
            splits["validation"] = [found["splits"].get("train") for found in others]
    except ValueError as fault:
        return {}, str(fault)
    templates = [template for found in facts if isinstance(template := found.get("template"), dict)]
    named = {"format": [found.get("format") for found in facts], "template": [found.get("name") for found in templates]}
    counts: dict[str, int | str] = {}
    for key in _DATA_NAMES:
        if names := list(dict.fromkeys(name for name in named[key] if isinstance(name, str))):
            counts[key] = printable(", ".join(names))
    counts |= _summed(facts, _DATA_COUNTS)
    for name, parts in splits.items():
        found = _summed([part for part in parts if isinstance(part, dict)], _SPLIT_COUNTS)
        counts |= {f"{name}_{key}": value for key, value in found.items()}
    return counts, ""


def _summed(parts: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, int]:
    """The numbers of several directories as one: their sums, and of lengths the largest."""
    values = {key: [part[key] for part in parts if isinstance(part.get(key), int)] for key in keys}
    return {key: (max if key in _LENGTHS else sum)(found) for key, found in values.items() if found}


def _spec_changes(origin: Origin | None) -> Iterator[str]:
    for change in [] if origin is None else origin.spec_changes:
        yield printable(f"{change.field}: {json.dumps(change.old)} -> {json.dumps(change.new)}")


def _versions(path: Path) -> dict[str, str]:
    """Versions of llamatune and torch, and the GPU with its driver and CUDA, from the newest checkpoint."""
    checkpoints = list_checkpoints(path / CHECKPOINTS)
    if not checkpoints:
        return {}
    try:
        state = read_progress(checkpoints[0])
    except OtherVersion:
        return {}
    except LlamatuneError:
        if checkpoints[0].exists():
            raise
        return {}  # the run, which is still going on, has pruned it
    named = {"llamatune": state.llamatune, "torch": state.torch}
    if state.gpu is not None:
        named |= {"GPU": state.gpu.name, "driver": state.gpu.driver, "CUDA": state.gpu.cuda}
    return {key: printable(text) for key, text in named.items() if text is not None}


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
