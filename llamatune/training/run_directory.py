"""The run directory: claiming it for a new or continued run, its metrics log, pruning of checkpoints."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamatune.durable_writing import (
    STAGING,
    disk_faults,
    make_directory,
    probe_writable,
    remove,
    remove_dead_staging,
    sync,
    write_atomic,
)
from llamatune.errors import EnvironmentFault, SpecError
from llamatune.events import RateSearch
from llamatune.formats.metrics import MetricsLog
from llamatune.formats.origin_json import dump_origin, read_origin
from llamatune.formats.state_json import list_checkpoints
from llamatune.formats.summary_json import read_summary
from llamatune.output_files import refuse_inside, refuse_replacing
from llamatune.ranks import Ranks
from llamatune.safe_reading import read_bytes
from llamatune.spec import RunSpec
from llamatune.strict_yaml import LARGEST_YAML
from llamatune.training.passes import PassRule
from llamatune.training.run_file_names import (
    ADAPTER,
    BEST,
    CELLS,
    CHECKPOINTS,
    METRICS,
    MODEL,
    ORIGIN,
    RUNS,
    SPEC,
    SUMMARY,
)
from llamatune.training.run_lock import LOCK, run_lock
from llamatune.training.spec_changes import LEAST_GAIN, MAY_GROW, PATIENCE, accepted_changes

_MADE_HERE = (SPEC, SUMMARY, ORIGIN, BEST, ADAPTER, MODEL, "probe", "renamed-probe")
_TRASH = ".trash-"


@dataclass(frozen=True)
class RunDirectory:
    """A locked run directory; make it with ``claim_run_directory``.

    ``changed_fields``: fields of the spec that changed between two starts of the run. ``log`` is None on all ranks but
    the first, which alone writes. ``rate_search`` is the one with which the run began, if it has begun and
    its spec's learning rate is ``auto``.
    """

    path: Path
    log: MetricsLog | None
    changed_fields: frozenset[str]
    passes: PassRule
    rate_search: RateSearch | None = None


def move_aside(path: Path) -> None:
    """Rename an existing directory to a numbered name, as ``run.old-1``."""
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    os.rename(path, aside)
    sync(path.parent)


def finished_summary(spec: RunSpec, inputs: Mapping[str, Any], allowed: tuple[str, ...]) -> dict[str, Any] | None:
    """The summary, if the output directory holds this run and it is finished; nothing is written, not even a lock.

    Raises what ``claim_run_directory`` raises where the spec or the inputs changed.
    """
    path = Path(spec.training.output_dir)
    if not (path / LOCK).is_file() or not (path / SUMMARY).is_file():
        return None
    accepted = accepted_changes(path, spec, inputs, allowed)
    summary = read_summary(path / SUMMARY)
    reopening = (*MAY_GROW, PATIENCE, LEAST_GAIN) if summary["stopped_early"] else MAY_GROW
    return None if any(change["field"] in reopening for change in accepted) else summary


@contextlib.contextmanager
def claim_run_directory(
    spec: RunSpec,
    inputs: Mapping[str, Any],
    overwrite: bool,
    resume: bool,
    allowed_changes: tuple[str, ...],
    choose_passes: Callable[[], PassRule],
    gpu: Mapping[str, Any] | None = None,
) -> Iterator[RunDirectory]:
    """Lock ``training.output_dir`` for this run, which keeps the passes that were chosen when it began.

    ``origin.json`` says on which ``gpu`` that was.

    A new or empty directory becomes the run's. A directory of this run is continued if ``spec`` and ``inputs`` (digests
    of the base, the data and the tokenizer) are unchanged. Any other is refused, or renamed under ``overwrite``.

    Raises:
        SpecError: fields of the spec changed. CheckpointError: the base or the data did.
        EnvironmentFault: the directory is no run, or in use.
    """
    path = Path(os.path.realpath(spec.training.output_dir))
    own, occupied = _is_run(path), is_occupied(path)
    if not overwrite:
        _refuse_other(path)
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
            sync(path)  # the lock marks it as a run's, whatever else a power cut leaves
        if own and not overwrite and (list_checkpoints(path / CHECKPOINTS) or (path / SUMMARY).is_file()):
            # Before its first checkpoint a run holds no result, so any spec may begin it anew.
            accepted, origin = accepted_changes(path, spec, inputs, allowed_changes), read_origin(path / ORIGIN)
            changes, passes = origin.changes, PassRule.restored(origin.passes)
            if accepted and changes[-len(accepted) :] != accepted:  # killed after this write, the run records it once
                changes = [*changes, *accepted]
            inputs = {**inputs, "spec_changes": changes} if changes else inputs
            gpu = None if origin.gpu is None else origin.gpu.model_dump(exclude_unset=True)
            search = origin.search
            if search is None and spec.training.learning_rate == "auto":
                what = "training.learning_rate: auto is for the beginning of a run, and this one began with a number"
                raise SpecError(what, path / SPEC, "give that number, or choose another training.output_dir")
        else:
            passes, search = choose_passes(), None
        _remove_leftovers(path)
        with disk_faults(path / SUMMARY):
            (path / SUMMARY).unlink(missing_ok=True)
        changed_fields = frozenset(change["field"] for change in inputs.get("spec_changes", []))
        with contextlib.closing(MetricsLog(path / METRICS)) as log:
            began_on = {} if gpu is None else {"gpu": gpu}
            found = {} if search is None else {"learning_rate_search": asdict(search)}
            values = {**inputs, "passes": asdict(passes), **began_on, **found}
            write_if_changed(path / ORIGIN, dump_origin(path / ORIGIN, values))
            write_if_changed(path / SPEC, spec.to_yaml().encode())
            yield RunDirectory(path, log, changed_fields, passes, search)


def record_rate_search(path: Path, search: RateSearch) -> None:
    """Add the search to ``origin.json`` of the run that begins at ``path``, which goes on with it."""
    values = read_origin(path / ORIGIN).model_dump(exclude_unset=True)
    write_if_changed(path / ORIGIN, dump_origin(path / ORIGIN, {**values, "learning_rate_search": asdict(search)}))


def refuse_output(spec: RunSpec, overwrite: bool) -> None:
    """Raise before any work if the run may not write to ``training.output_dir``.

    Raises:
        SpecError: it is something that the run reads, or is inside of it, or would be moved together with it.
        EnvironmentFault: without ``overwrite``, it holds something else than a run.
    """
    refuse_inputs(spec, "training.output_dir", overwrite)
    if (size := len(spec.to_yaml().encode())) > LARGEST_YAML:
        what = f"written out it has {size:,} bytes, more than the {LARGEST_YAML:,} that a spec may have"
        raise SpecError(what, "data", "name fewer directories")
    if not overwrite:
        _refuse_other(Path(spec.training.output_dir))


def refuse_inputs(spec: RunSpec, name: str, overwrite: bool) -> None:
    """Raise ``SpecError`` where ``training.output_dir``, given as ``name``, is something that the run reads.

    Also if it is inside of that or, with ``overwrite``, would be moved aside together with it.
    """
    path = Path(spec.training.output_dir)
    inputs = [("model.path", Path(spec.model.path))]
    inputs += [("data.train", directory) for directory in spec.data.train_paths]
    inputs += [("data.validation", directory) for directory in spec.data.validation_paths]
    if isinstance(spec.evaluation.prompts, str):
        inputs.append(("evaluation.prompts", Path(spec.evaluation.prompts)))
    if spec.lora is not None and spec.lora.init_from is not None:
        inputs.append(("lora.init_from", Path(spec.lora.init_from)))
    inputs = [(key, given) for key, given in inputs if _is_name(str(given))]
    if not _is_name(str(path)):
        raise EnvironmentFault("the locale has no such characters in names", path, "set LC_ALL=C.UTF-8")
    refuse_replacing(path, inputs, name, keeps=not overwrite)
    refuse_inside(path, inputs, name)


def _is_name(path: str) -> bool:
    """Whether a file can have this name in the locale: in C it is ASCII."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _refuse_other(path: Path) -> None:
    if is_occupied(path) and not _is_run(path):
        raise EnvironmentFault(
            "the directory is not empty and is no run", path, "choose another training.output_dir, or pass --overwrite"
        )


def _is_run(path: Path) -> bool:
    # The lock is the first file that a run makes, so this is right whenever it was killed.
    return (path / LOCK).is_file() and not any((path / name).exists() for name in (CELLS, RUNS))


def is_occupied(path: Path) -> bool:
    """Whether something other than the lock and what it leaves stands at ``path``."""
    return path.exists() and (not path.is_dir() or any(not is_ours(entry) for entry in path.iterdir()))


def share_run(run: RunDirectory | None, spec: RunSpec, ranks: Ranks) -> RunDirectory:
    """The claimed directory of the first rank on every rank, without its log on the others."""
    shared: Any = None
    if run is not None:
        search = None if run.rate_search is None else asdict(run.rate_search)
        shared = [asdict(run.passes), sorted(run.changed_fields), search]
    shared = ranks.from_first(shared)
    if run is not None:
        return run
    (passes, changed_fields, search), path = shared, Path(os.path.realpath(spec.training.output_dir))
    found = None if search is None else RateSearch(**search)
    return RunDirectory(path, None, frozenset(changed_fields), PassRule(**passes), found)


def is_ours(entry: Path) -> bool:
    """Whether a file is a lock or a leftover of llamatune: it does not make a directory occupied."""
    return entry.name.startswith(".llamatune")


def write_if_changed(path: Path, content: bytes) -> None:
    """Replace a file, unless it has this content already."""
    if path.is_file() and path.stat().st_size == len(content) and read_bytes(path, max_bytes=len(content)) == content:
        return
    write_atomic(path, content)


def _remove_leftovers(path: Path) -> None:
    """Remove what a killed process of this run was writing or removing; we hold its lock, so it is gone."""
    for name in _MADE_HERE:
        remove_dead_staging(path, name, owned=True)
    for leftover in (path / CHECKPOINTS).glob(".*"):  # only runs write here
        if leftover.name.startswith((STAGING, _TRASH)):
            remove(leftover)


def prune_finished(spec: RunSpec, on_fault: Callable[[str], None]) -> None:
    """Try again to remove what a finished run could not: old checkpoints, and those that were renamed for deletion."""
    directory = Path(os.path.realpath(spec.training.output_dir)) / CHECKPOINTS
    trash = [path for path in directory.glob(f"{_TRASH}*") if path.is_dir()] if directory.is_dir() else []
    checkpoints = list_checkpoints(directory)
    if not trash and len(checkpoints) <= spec.training.keep_last:
        return
    try:
        with run_lock(directory.parent):
            for path in trash:
                _delete(path, path, on_fault)
            if checkpoints:
                prune_checkpoints(checkpoints[0], spec.training.keep_last, on_fault)
    except EnvironmentFault as fault:
        on_fault(f"old checkpoints stay: {fault}")


def prune_checkpoints(newest: Path, keep_last: int, on_fault: Callable[[str], None]) -> None:
    """Remove all but the last ``keep_last`` checkpoints up to ``newest``, which is known to be good.

    Each is renamed before it is deleted. Those of later steps are damaged, or one of them would be the newest: they do
    not count, and the run replaces them when it gets there.
    """
    checkpoints = list_checkpoints(newest.parent)
    for path in checkpoints[checkpoints.index(newest) + keep_last :]:
        _delete(path, path.with_name(f"{_TRASH}{path.name}"), on_fault)


def _delete(path: Path, trash: Path, on_fault: Callable[[str], None]) -> None:
    """Rename a checkpoint to ``trash`` and delete it; the next run tries again what fails."""
    try:
        if path != trash:
            shutil.rmtree(trash, ignore_errors=True)
            os.rename(path, trash)
        shutil.rmtree(trash)
    except OSError as fault:
        on_fault(f"could not remove the old checkpoint {path}: {fault.strerror}: the next run tries again")
