"""What a run needs to continue exactly: trained tensors, optimizer state, and where it stood."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from llamatune.checkpoints.tensor_bytes import write_tensors
from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError, EnvironmentFault, LlamatuneError
from llamatune.formats.manifest import OtherVersion, Staging, build_directory, verify_product
from llamatune.formats.safetensors import read_header
from llamatune.strict_json import dump_json, read_json

_NAME = re.compile(r"step-(\d{6,})")
_OPTIMIZER, PROGRESS = "optimizer.safetensors", "state.json"
SCHEMA = 1


@dataclass(frozen=True)
class RunState:
    """A checkpoint read back: ``optimizer`` tensors are named ``<parameter>/<state>``, ``progress`` is plain JSON."""

    path: Path
    optimizer: dict[str, Tensor]
    progress: dict[str, Any]


def checkpoint_path(directory: Path, step: int) -> Path:
    """``checkpoints/step-000100`` inside a run directory."""
    return directory / f"step-{step:06d}"


def save_run_state(
    path: Path,
    write_weights: Callable[[Staging], None],
    optimizer: Mapping[str, Tensor],
    progress: Mapping[str, Any],
) -> None:
    """Write one checkpoint durably; ``write_weights`` puts the trained tensors into what it is given."""
    with build_directory(path, "checkpoint", {"step": progress["step"]}, overwrite=True) as staging:
        write_weights(staging)
        write_tensors(staging, _OPTIMIZER, optimizer)
        with writing(staging.path / PROGRESS) as file:
            file.write(dump_json({"schema": SCHEMA, **progress}))


def read_run_state(path: Path) -> RunState:
    """Read and verify one checkpoint."""
    verify_product(path)
    progress = read_progress(path)
    read_header(path / _OPTIMIZER)
    return RunState(path, load_file(path / _OPTIMIZER), progress)


def read_progress(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint: ``step``, ``position``, ``scaler``, ``metrics_bytes``, and what wrote it."""
    progress = read_json(path / PROGRESS)
    if progress.get("schema") != SCHEMA:
        raise OtherVersion(progress.get("schema"), path)
    kinds = {"step": int, "metrics_bytes": int, "position": dict, "scaler": dict}
    wrong = [name for name, kind in kinds.items() if type(progress.get(name)) is not kind]
    if wrong:
        raise CheckpointError(f"{wrong[0]} is {str(progress.get(wrong[0]))[:80]!r}", path / PROGRESS)
    return progress


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints of a run, newest step first; the clock has no say."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), p) for p in directory.iterdir() if (match := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_run_state(directory: Path, on_skip: Callable[[str], None]) -> RunState | None:
    """The newest checkpoint that verifies; each newer one that does not is told to ``on_skip`` in one line.

    Raises:
        EnvironmentFault: none verifies, and one could not be read: to start over would throw it away.
        OtherVersion: so would it one that another version wrote.
    """
    unreadable = None
    for path in list_checkpoints(directory):
        try:
            return read_run_state(path)
        except OtherVersion:
            raise
        except EnvironmentFault as fault:
            unreadable = fault
            on_skip(f"skipped {path}: {fault}")
        except LlamatuneError as fault:
            on_skip(f"skipped {path}: {fault}")
    if unreadable is not None:
        raise unreadable
    return None
