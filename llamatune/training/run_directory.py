"""One run, one directory: who owns it, whether this spec continues it, and its metrics log."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llamatune.checkpoints.run_state import list_checkpoints
from llamatune.errors import CheckpointError, EnvironmentFault, SpecError
from llamatune.files import dump_json, parse_json, probe_writable, read_bytes, read_json, sync_directory, write_atomic
from llamatune.spec import RunSpec, load_spec

LOCK, SPEC, METRICS, SUMMARY, ORIGIN = ".llamatune.lock", "spec.yaml", "metrics.jsonl", "summary.json", "origin.json"
CHECKPOINTS, BEST = "checkpoints", "best"

_MAY_CHANGE = ("training.log_every_steps", "training.keep_last", "training.output_dir")
_MAY_GROW = ("training.num_epochs", "training.max_steps")


class RunDirectory:
    """A locked run directory; make it with ``claim_run_directory``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = (path / METRICS).open("ab")

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def record(self, values: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``."""
        line = json.dumps(values, allow_nan=False) + "\n"
        self._metrics.write(line.encode())
        self._metrics.flush()

    def sync_metrics(self) -> int:
        """Make the log durable; its length in bytes."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        return self._metrics.tell()

    def cut_metrics(self, length: int) -> None:
        """Drop what was logged after the checkpoint that is being resumed."""
        if length > self._metrics.tell():
            raise CheckpointError(
                "shorter than its last checkpoint remembers",
                self.path / METRICS,
                "was it edited? start again elsewhere",
            )
        self._metrics.truncate(length)
        self._metrics.seek(length)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomic(self.path / SUMMARY, dump_json(summary))

    def close(self) -> None:
        self._metrics.close()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _refuse_changes(
    old: RunSpec, new: RunSpec, allowed: tuple[str, ...], where: Path
) -> tuple[bool, list[dict[str, Any]]]:
    """Raise on a changed field; whether the run is to go on for longer than it was, and the changes that count."""
    before, after = dict(_flat(old.model_dump(mode="json"))), dict(_flat(new.model_dump(mode="json")))
    grown, refused, accepted = False, [], []
    for field in sorted(before.keys() | after.keys()):
        was, now = before.get(field), after.get(field)
        if was == now or field in _MAY_CHANGE or field in allowed:
            grown |= was != now and field in _MAY_GROW
            if was != now and field not in _MAY_CHANGE:
                accepted.append({"field": field, "old": was, "new": now})
        elif field in _MAY_GROW and was is not None and now is not None and now > was:
            grown = True
            accepted.append({"field": field, "old": was, "new": now})
        else:
            refused.append(f"{field}: {was} -> {now}")
    if refused:
        raise SpecError(
            "the spec differs from the run's: " + "; ".join(refused),
            where,
            "restore it, choose another training.output_dir, or pass --allow-spec-change FIELD",
        )
    return grown, accepted


def _refuse_other_inputs(old: Mapping[str, Any], new: Mapping[str, Any], where: Path) -> None:
    changed = [f"{key}: {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]
    if changed:
        raise CheckpointError(
            "the run was started on something else: " + "; ".join(changed), where, "choose another training.output_dir"
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An advisory lock that dies with its process."""
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentFault(f"in use by {_owner(descriptor)}", path, "wait for it or stop it") from None
        note = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(note).encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    try:
        note = parse_json(os.pread(descriptor, 4096, 0))
        return f"process {note['pid']} on {note['host']} since {note['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _move_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    os.rename(path, aside)
    sync_directory(path.parent)


def _is_run(path: Path) -> bool:
    """Whether a run began here: its lock is the first file that it makes, so this holds whenever it was killed."""
    return (path / LOCK).is_file()


def finished_summary(
    spec: RunSpec, inputs: Mapping[str, Any], allowed_changes: tuple[str, ...] = ()
) -> dict[str, Any] | None:
    """The summary, if the output directory holds this very run, finished; nothing is written, not even a lock.

    Raises:
        SpecError: fields of the spec changed. CheckpointError: the base or the data did.
    """
    path = Path(spec.training.output_dir)
    if not _is_run(path) or not (path / SUMMARY).is_file():
        return None
    grown, _ = _refuse_changes(load_spec(path / SPEC), spec, allowed_changes, path / SPEC)
    _refuse_other_inputs(read_json(path / ORIGIN), inputs, path / ORIGIN)
    return None if grown else read_json(path / SUMMARY)


@contextlib.contextmanager
def claim_run_directory(
    spec: RunSpec,
    inputs: Mapping[str, Any],
    overwrite: bool = False,
    resume: bool = True,
    allowed_changes: tuple[str, ...] = (),
) -> Iterator[RunDirectory]:
    """Lock ``training.output_dir`` for this run.

    A new or empty directory becomes the run's. The run's own is continued if ``spec`` and ``inputs`` (digests of the
    base, the data and the tokenizer) are what they were. Anything else is refused, or moved aside by ``overwrite``.

    Raises:
        SpecError: fields of the spec changed. CheckpointError: the base or the data did.
        EnvironmentFault: somebody else's directory, or in use.
    """
    path = Path(os.path.realpath(spec.training.output_dir))
    own = _is_run(path)
    occupied = path.exists() and (not path.is_dir() or any(not _is_ours(entry) for entry in path.iterdir()))
    if occupied and not overwrite and not own:
        raise EnvironmentFault(
            "the directory is not empty and is no run", path, "choose another training.output_dir, or pass --overwrite"
        )
    if occupied and not overwrite and not resume:
        raise EnvironmentFault("holds a run, and --resume is never", path, "pass --overwrite, or choose another one")
    probe_writable(path.parent if occupied and overwrite else path)
    if occupied and overwrite:
        if path.is_dir():
            with _locked(path):
                pass
        _move_aside(path)
        path.mkdir()
    with _locked(path):
        if own and not overwrite and (list_checkpoints(path / CHECKPOINTS) or (path / SUMMARY).is_file()):
            # Before its first checkpoint a run holds nothing that another spec could contradict.
            _, accepted = _refuse_changes(load_spec(path / SPEC), spec, allowed_changes, path / SPEC)
            origin = read_json(path / ORIGIN)
            _refuse_other_inputs(origin, inputs, path / ORIGIN)
            inputs = {**inputs, "spec_changes": [*origin.get("spec_changes", []), *accepted]}
        (path / SUMMARY).unlink(missing_ok=True)
        run = RunDirectory(path)
        try:
            _write_if_changed(path / ORIGIN, dump_json(inputs))
            _write_if_changed(path / SPEC, spec.to_yaml().encode())
            yield run
        finally:
            run.close()


def _is_ours(entry: Path) -> bool:
    """Whether a file in a directory is a lock or a leftover of ours, which anything may be written beside."""
    return entry.name.startswith(".llamatune")


def _write_if_changed(path: Path, content: bytes) -> None:
    if path.is_file() and read_bytes(path) == content:
        return
    write_atomic(path, content)


def prune_checkpoints(found: list[Path], keep_last: int, on_fault: Callable[[str], None]) -> None:
    """Remove all but the first ``keep_last`` of ``found``; each leaves the namespace before it is deleted."""
    for path in found[keep_last:]:
        trash = path.with_name(f".trash-{path.name}")
        try:
            shutil.rmtree(trash, ignore_errors=True)
            os.rename(path, trash)
            shutil.rmtree(trash)
        except OSError as fault:
            on_fault(f"could not remove the old checkpoint {path}: {fault.strerror}")
