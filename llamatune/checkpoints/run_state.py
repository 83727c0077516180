"""What a run needs to continue exactly: trained tensors, optimizer state, and where it stood."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llamatune.checkpoints.tensors import write_tensors
from llamatune.errors import CheckpointError, LlamatuneError
from llamatune.files import MANIFEST, Staging, build_directory, digest_file, dump_json, read_json, writing
from llamatune.tensor_files import read_header

_NAME = re.compile(r"step-(\d{6,})")
_OPTIMIZER, _PROGRESS = "optimizer.safetensors", "state.json"
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
        write_tensors(staging.path / _OPTIMIZER, optimizer)
        with writing(staging.path / _PROGRESS) as file:
            file.write(dump_json({"schema": SCHEMA, **progress}))


def verify_checkpoint(path: Path) -> None:
    """Compare every file with the manifest's sizes and digests; ``CheckpointError`` names the first that differs."""
    files = read_json(path / MANIFEST, max_bytes=16 << 20).get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError("no files in its manifest", path)
    for name, facts in files.items():
        if name != Path(name).name:
            raise CheckpointError("the manifest names a file elsewhere", path)
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts.get("bytes"):
            raise CheckpointError(f"{size} bytes where the manifest says {facts.get('bytes')}", file)
        if digest_file(file) != facts.get("sha256"):
            raise CheckpointError("its content does not match the manifest's SHA-256", file)


def read_run_state(path: Path) -> RunState:
    """Read and verify one checkpoint."""
    verify_checkpoint(path)
    progress = read_json(path / _PROGRESS)
    if progress.get("schema") != SCHEMA:
        raise CheckpointError(f"written by another version (schema {progress.get('schema')})", path)
    read_header(path / _OPTIMIZER)
    return RunState(path, load_file(path / _OPTIMIZER), progress)


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints of a run, newest step first; the clock has no say."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), p) for p in directory.iterdir() if (match := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_run_state(directory: Path, on_skip: Callable[[str], None]) -> RunState | None:
    """The newest checkpoint that verifies; each newer one that does not is told to ``on_skip`` in one line."""
    for path in list_checkpoints(directory):
        try:
            return read_run_state(path)
        except LlamatuneError as fault:
            on_skip(f"skipped {path}: {fault}")
    return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The state of ``optimizer`` by parameter name (in the order in which the parameters were given)."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": value.detach()
        for index, entry in state.items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Put tensors of ``optimizer_tensors`` back."""
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        if name not in names:
            raise CheckpointError(f"optimizer state of the unknown parameter {name}", _OPTIMIZER)
        state.setdefault(names.index(name), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
