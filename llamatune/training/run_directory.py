"""One run, one directory: who owns it, whether this spec continues it, and its metrics log."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llamatune.durable_writing import (
    STAGING,
    disk_faults,
    make_directory,
    probe_writable,
    remove,
    remove_dead_staging,
    sync_directory,
    write_atomic,
)
from llamatune.errors import CheckpointError, EnvironmentFault, SpecError
from llamatune.formats.metrics import MetricsLog
from llamatune.formats.state_json import list_checkpoints
from llamatune.safe_reading import read_bytes
from llamatune.spec import RunSpec, TrackingSection, load_spec
from llamatune.strict_json import dump_json, read_json
from llamatune.training.run_files import ADAPTER, BEST, CHECKPOINTS, METRICS, MODEL, ORIGIN, SPEC, SUMMARY
from llamatune.training.run_lock import LOCK, run_lock

_MADE_HERE = (SPEC, SUMMARY, ORIGIN, BEST, ADAPTER, MODEL, "probe", "renamed-probe")
_TRASH = ".trash-"

_MAY_CHANGE = (
    "training.log_every_steps",
    "training.log_layer_grad_norms",
    "training.profile_steps",
    "training.keep_last",
    "training.output_dir",
    # What is recomputed, and where weights lie, changes no bit.
    "training.activation_checkpointing",
    "training.memory_limit",
    "model.memory_map",
    *(f"tracking.{name}" for name in TrackingSection.model_fields),
)
_MAY_GROW = ("training.num_epochs", "training.max_steps")
_PATIENCE = "evaluation.early_stopping_patience"
LEAST_GAIN = "evaluation.early_stopping_min_delta"


class RunDirectory:
    """A locked run directory; make it with ``claim_run_directory``.

    ``changed_fields`` are those of the spec that changed between two starts of the run.
    """

    def __init__(self, path: Path, changed_fields: frozenset[str] = frozenset()) -> None:
        self.path, self.changed_fields = path, changed_fields
        self.log = MetricsLog(path / METRICS)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        write_atomic(self.path / SUMMARY, dump_json(summary))


def _is_growth(field: str, was: Any, now: Any, after: Mapping[str, Any]) -> bool:
    """Whether a change makes a run longer and nothing else: what was computed until now stays what it would be."""
    if field in _MAY_GROW:
        return was is not None and now is not None and bool(now > was)
    if field == _PATIENCE:
        return was is not None and (now is None or now > was)
    return field == LEAST_GAIN and after[_PATIENCE] is None  # nobody asks for it any more


def _refuse_changes(old: RunSpec, new: RunSpec, allowed: tuple[str, ...], where: Path) -> list[dict[str, Any]]:
    """Raise on a changed field; the changes that are accepted and count."""
    before, after = old.flat(), new.flat()
    refused, accepted = [], []
    for field in sorted(before.keys() | after.keys()):
        was, now = before.get(field), after.get(field)
        if was == now or field in _MAY_CHANGE:
            continue
        if field in allowed or _is_growth(field, was, now, after):
            accepted.append({"field": field, "old": was, "new": now})
        else:
            refused.append(f"{field}: {was} -> {now}")
    if refused:
        raise SpecError(
            "the spec differs from the run's: " + "; ".join(refused),
            where,
            "restore it, choose another training.output_dir, or pass --allow-spec-change FIELD",
        )
    return accepted


def _refuse_other_inputs(old: Mapping[str, Any], new: Mapping[str, Any], where: Path) -> None:
    changed = [f"{key}: {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]
    if changed:
        raise CheckpointError(
            "the run was started on something else: " + "; ".join(changed), where, "choose another training.output_dir"
        )


def move_aside(path: Path) -> None:
    """Give a directory that is in the way a name with a number."""
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
    accepted = _refuse_changes(load_spec(path / SPEC), spec, allowed_changes, path / SPEC)
    _refuse_other_inputs(read_json(path / ORIGIN), inputs, path / ORIGIN)
    summary = read_json(path / SUMMARY)
    reopening = (*_MAY_GROW, _PATIENCE, LEAST_GAIN) if summary.get("stopped_early") else _MAY_GROW
    return None if any(change["field"] in reopening for change in accepted) else summary


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
    occupied = path.exists() and (not path.is_dir() or any(not is_ours(entry) for entry in path.iterdir()))
    if occupied and not overwrite and not own:
        raise EnvironmentFault(
            "the directory is not empty and is no run", path, "choose another training.output_dir, or pass --overwrite"
        )
    if occupied and not overwrite and not resume:
        raise EnvironmentFault("holds a run, and --resume is never", path, "pass --overwrite, or choose another one")
    probe_writable(path.parent if occupied and overwrite else path)
    if occupied and overwrite:
        if path.is_dir():
            with run_lock(path):
                pass
        move_aside(path)
        make_directory(path)
    with run_lock(path):
        with disk_faults(path / LOCK):
            sync_directory(path)  # by the lock's name it is known to be a run's, whatever else a power cut leaves
        if own and not overwrite and (list_checkpoints(path / CHECKPOINTS) or (path / SUMMARY).is_file()):
            # Before its first checkpoint a run holds nothing that another spec could contradict.
            accepted = _refuse_changes(load_spec(path / SPEC), spec, allowed_changes, path / SPEC)
            origin = read_json(path / ORIGIN)
            _refuse_other_inputs(origin, inputs, path / ORIGIN)
            changes = origin.get("spec_changes", [])
            if accepted and changes[-len(accepted) :] != accepted:  # killed after this write, it is here again
                changes = [*changes, *accepted]
            inputs = {**inputs, "spec_changes": changes} if changes else inputs
        _remove_leftovers(path)
        with disk_faults(path / SUMMARY):
            (path / SUMMARY).unlink(missing_ok=True)
        run = RunDirectory(path, frozenset(change["field"] for change in inputs.get("spec_changes", [])))
        try:
            write_if_changed(path / ORIGIN, dump_json(inputs))
            write_if_changed(path / SPEC, spec.to_yaml().encode())
            yield run
        finally:
            run.log.close()


def is_ours(entry: Path) -> bool:
    """Whether a file in a directory is a lock or a leftover of ours, which anything may be written beside."""
    return entry.name.startswith(".llamatune")


def write_if_changed(path: Path, content: bytes) -> None:
    """Replace a file, unless it is what it would become."""
    if path.is_file() and path.stat().st_size == len(content) and read_bytes(path, max_bytes=len(content)) == content:
        return
    write_atomic(path, content)


def _remove_leftovers(path: Path) -> None:
    """Remove what a killed process of this run was making or removing; the lock says that it is gone."""
    for name in _MADE_HERE:
        remove_dead_staging(path, name, owned=True)
    for leftover in (path / CHECKPOINTS).glob(".*"):  # nobody else has anything to do in there
        if leftover.name.startswith((STAGING, _TRASH)):
            remove(leftover)


def prune_checkpoints(newest: Path, keep_last: int, on_fault: Callable[[str], None]) -> None:
    """Of the checkpoints up to ``newest``, which is known to be good, keep the last so many.

    Each leaves the namespace before it is deleted. One of a later step is damaged, or it would be the newest: it is
    left to be replaced when the run gets there, and does not count.
    """
    found = list_checkpoints(newest.parent)
    for path in found[found.index(newest) + keep_last :]:
        trash = path.with_name(f"{_TRASH}{path.name}")
        try:
            shutil.rmtree(trash, ignore_errors=True)
            os.rename(path, trash)
            shutil.rmtree(trash)
        except OSError as fault:
            on_fault(f"could not remove the old checkpoint {path}: {fault.strerror}")
