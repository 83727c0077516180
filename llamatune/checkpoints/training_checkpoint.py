"""Checkpoints of a run: trained tensors, optimizer state and ``state.json``, saved and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from llamatune.checkpoints.sharded_checkpoint import StoredTensors, shard_files
from llamatune.checkpoints.tensor_bytes import write_tensors
from llamatune.errors import EnvironmentFault, LlamatuneError
from llamatune.formats.manifest import OtherVersion, Staging, build_directory, find_manifest, verify_product
from llamatune.formats.safetensors import read_header
from llamatune.formats.state_json import SavedState, list_checkpoints, read_progress, write_progress

WEIGHTS = "weights.safetensors"
"""Every parameter, where all are trained by one process."""
_OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class RunState:
    """A checkpoint read back: ``optimizer`` tensors are named ``<parameter>/<state>``, ``progress`` is ``state.json``.

    ``stored``: weights and optimizer state that are to be read by ranges, in place of ``optimizer``.
    """

    path: Path
    optimizer: dict[str, Tensor]
    progress: SavedState
    stored: StoredTensors | None = None


def save_run_state(
    path: Path, write_weights: Callable[[Staging], None], optimizer: Mapping[str, Tensor], progress: SavedState
) -> None:
    """Write one checkpoint durably; ``write_weights`` writes the trained tensors into the staging directory."""
    with build_directory(path, "checkpoint", {"step": progress.step}, overwrite=True) as staging:
        write_weights(staging)
        write_tensors(staging, _OPTIMIZER, optimizer)
        write_progress(staging.path, progress)


def read_run_state(path: Path, in_ranges: bool = False, verified: bool = False) -> RunState:
    """Read and verify one checkpoint.

    Args:
        in_ranges: nothing is loaded yet; that is so of what several ranks wrote, too.
        verified: its bytes were verified by another rank.
    """
    manifest = (find_manifest(path) if verified else None) or verify_product(path)
    progress, shards = read_progress(path), shard_files(manifest)
    if shards or in_ranges:
        return RunState(path, {}, progress, StoredTensors(path, shards or (WEIGHTS, _OPTIMIZER), bool(shards)))
    read_header(path / _OPTIMIZER)
    return RunState(path, load_file(path / _OPTIMIZER), progress)


def newest_run_state(directory: Path, on_skip: Callable[[str], None], in_ranges: bool = False) -> RunState | None:
    """The newest checkpoint that verifies; ``on_skip`` gets one line for each newer one that does not.

    Raises:
        EnvironmentFault: none verifies and one could not be read; starting over would lose it.
        OtherVersion: another version wrote one; starting over would lose it.
    """
    unreadable = None
    for path in list_checkpoints(directory):
        try:
            return read_run_state(path, in_ranges)
        except OtherVersion:
            raise
        except LlamatuneError as fault:
            on_skip(f"skipped {path}: {fault}")
            if isinstance(fault, EnvironmentFault):
                unreadable = fault
    if unreadable is not None:
        raise unreadable
    return None
