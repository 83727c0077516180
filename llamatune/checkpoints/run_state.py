"""Checkpoints of a run: trained tensors, optimizer state and ``state.json``, written and read. A format of ours.

``state.json`` holds ``schema``, ``step``, ``position``, ``scaler``, ``metrics_bytes`` (the length of the log), and the
versions and machine that wrote it. A checkpoint of another schema is not skipped but refused.
"""

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
    """Write one checkpoint durably; ``write_weights`` writes the trained tensors into the staging directory."""
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
    """``state.json`` of a checkpoint."""
    progress = read_json(path / PROGRESS)
    if progress.get("schema") != SCHEMA:
        raise OtherVersion(progress.get("schema"), path)
    kinds = {"step": int, "metrics_bytes": int, "position": dict, "scaler": dict}
    wrong = [name for name, kind in kinds.items() if type(progress.get(name)) is not kind]
    if wrong:
        raise CheckpointError(f"{wrong[0]} is {str(progress.get(wrong[0]))[:80]!r}", path / PROGRESS)
    return progress


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints of a run by step, the newest first."""
    if not directory.is_dir():
        return []
    steps = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(steps, reverse=True)]


def newest_run_state(directory: Path, on_skip: Callable[[str], None]) -> RunState | None:
    """The newest checkpoint that verifies; ``on_skip`` gets one line for each newer one that does not.

    Raises:
        EnvironmentFault: none verifies and one could not be read; starting over would lose it.
        OtherVersion: another version wrote one; starting over would lose it.
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
