"""Checkpoints that several ranks write together, and tensors of any checkpoint read by ranges of elements.

Each rank writes ``shard-00001-of-00004.safetensors``. It holds flat runs of the whole tensors, named
``<tensor>@<first element>``; a tensor is a weight or, named ``<weight>/<state>``, a part of the optimizer's state.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llamatune.checkpoints.checkpoint import read_into
from llamatune.checkpoints.tensor_bytes import write_tensors
from llamatune.durable_writing import sync
from llamatune.errors import CheckpointError
from llamatune.formats.manifest import Manifest, Staging, build_directory
from llamatune.formats.safetensors import TensorLocation, read_header
from llamatune.formats.state_json import SavedState, write_progress
from llamatune.model.torch_dtypes import STORED_NAMES
from llamatune.ranks import Ranks

_SHARD = re.compile(r"shard-(\d{5,})-of-(\d{5,})\.safetensors")
_BROKEN = "fetch it again, or remove it: the run goes on from the one before"


def save_sharded_state(path: Path, runs: Mapping[str, Tensor], progress: SavedState, ranks: Ranks) -> None:
    """Write one checkpoint durably; all ranks call it, each with its ``runs``, and the first names it.

    The first makes the staging directory, and the directory complete when every rank has synced its file there.
    """

    def write(staging: Staging) -> None:
        name = f"shard-{ranks.rank:05d}-of-{ranks.size:05d}.safetensors"
        write_tensors(staging, name, runs)
        staging.finish_digests()
        sync(staging.path / name)

    if not ranks.is_first:
        staging = Staging(Path(ranks.from_first("")))
        write(staging)
        ranks.gather(staging.digests)
        return
    with build_directory(path, "checkpoint", {"step": progress.step}, overwrite=True) as staging:
        ranks.from_first(str(staging.path))
        write(staging)
        for digests in ranks.gather(staging.digests):
            staging.digests |= digests
        write_progress(staging.path, progress)


def run_name(tensor: str, begin: int) -> str:
    """The name of the run of a tensor that begins at this element."""
    return f"{tensor}@{begin}"


def shard_files(manifest: Manifest) -> tuple[str, ...]:
    """The files of all ranks, in order; none in a checkpoint of one process.

    Raises:
        CheckpointError: not those of one number of ranks.
    """
    found = sorted((match for name in manifest.files if (match := _SHARD.fullmatch(name))), key=lambda m: int(m[1]))
    if [(int(m[1]), int(m[2])) for m in found] != [(rank, len(found)) for rank in range(len(found))]:
        raise CheckpointError("its shards are not those of one number of ranks", manifest.path, _BROKEN)
    return tuple(match[0] for match in found)


class StoredTensors:
    """The tensors of a checkpoint, whole or in runs; what is asked for is read, and nothing else."""

    def __init__(self, checkpoint: Path, files: Sequence[str], in_runs: bool) -> None:
        self.path = checkpoint
        self._runs: dict[str, list[tuple[int, int, TensorLocation]]] = defaultdict(list)
        for file in files:
            for name, location in read_header(checkpoint / file)[0].items():
                tensor, _, begin = name.rpartition("@") if in_runs else (name, "", "0")
                count = math.prod(location.shape)
                if not tensor or not begin.isdecimal() or location.dtype not in STORED_NAMES.values():
                    raise CheckpointError(f"holds {name[:80]!r}, which is no run of a tensor", location.path, _BROKEN)
                self._runs[tensor].append((int(begin), count, location))
        for tensor, runs in self._runs.items():
            runs.sort(key=lambda run: run[:2])
            ends = [0, *(begin + count for begin, count, _ in runs)]
            if [begin for begin, _, _ in runs] != ends[:-1]:
                raise CheckpointError(f"the runs of {tensor} overlap or leave a gap", checkpoint, _BROKEN)

    def weights(self) -> set[str]:
        return {name for name in self._runs if "/" not in name}

    def states(self) -> set[str]:
        """The names of the weights that have a state of the optimizer."""
        return {name.rpartition("/")[0] for name in self._runs if "/" in name}

    def fits(self, tensor: str, dtype: torch.dtype, elements: int) -> bool:
        """Whether there is such a tensor."""
        runs = self._runs.get(tensor, [])
        return sum(count for _, count, _ in runs) == elements and all(
            location.dtype == STORED_NAMES[dtype] for _, _, location in runs
        )

    def fill(self, into: Tensor, tensor: str, first: int) -> None:
        """Read the elements from ``first`` on into a tensor that ``fits``, of any shape and on any device."""
        flat = torch.empty(into.numel(), dtype=into.dtype)
        for begin, count, location in self._runs[tensor]:
            low, high = max(begin, first), min(begin + count, first + len(flat))
            if low < high:
                read_into(
                    location.path, location.begin + (low - begin) * flat.itemsize, flat[low - first : high - first]
                )
        into.copy_(flat.view(into.shape))
