"""``state.json`` of a run's checkpoint, and the names of checkpoints. No torch.

It holds ``schema``, ``step``, ``position``, ``scaler``, ``metrics_bytes`` (the length of the log), and the versions and
the machine that wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.formats.manifest import OtherVersion
from llamatune.strict_json import read_json, write_json

STATE, SCHEMA = "state.json", 2
BASE_FILES = "base_files"
"""Size and SHA-256 of the base's files by name, as a manifest has them, as far as they were known; it may be absent."""
_READ = (1, SCHEMA)  # 1: by versions that compute each micro-batch by itself and cannot continue a later run
_NAME = re.compile(r"step-(\d{6,})")
_KINDS = {"step": int, "metrics_bytes": int, "position": dict, "scaler": dict}


def checkpoint_path(directory: Path, step: int) -> Path:
    """``checkpoints/step-000100`` inside a run directory."""
    return directory / f"step-{step:06d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints of a run by step, the newest first."""
    if not directory.is_dir():
        return []
    steps = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(steps, reverse=True)]


def write_progress(checkpoint: Path, progress: Mapping[str, Any]) -> None:
    """Write ``state.json`` into a checkpoint's staging directory."""
    write_json(checkpoint / STATE, {"schema": SCHEMA, **progress})


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Read ``state.json`` of a checkpoint."""
    progress = read_json(checkpoint / STATE)
    if progress.get("schema") not in _READ:
        raise OtherVersion(progress.get("schema"), checkpoint)
    wrong = [name for name, kind in _KINDS.items() if type(progress.get(name)) is not kind]
    if wrong:
        raise CheckpointError(f"{wrong[0]} is {str(progress.get(wrong[0]))[:80]!r}", checkpoint / STATE)
    return progress
