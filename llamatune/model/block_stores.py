"""Where streamed blocks lie: in host memory, or a slice of each block on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from llamatune.errors import EnvironmentFault
from llamatune.ranks import Ranks
from llamatune.units import gibibytes

ALIGNMENT = 64
"""Bytes, as torch aligns its own tensors: a kernel's order of addition may depend on the alignment."""

Arrival = Callable[[], None]
"""Called before a block is used: work that is queued after it on the device finds the block in its room."""


class BlockStore(Protocol):
    """The bytes of all blocks. ``room_bytes`` is the size of a room; ``kept`` are bytes of each block, held here."""

    room_bytes: int
    kept: range
    tensors: list[Tensor]

    def write(self, layer: int, begin: int, data: Tensor) -> None:
        """Store bytes of a block, of which ``data`` is the part from ``begin`` on; what is not kept here is dropped."""

    def fetch(self, layer: int, room: Tensor) -> Arrival:
        """Begin to fill ``room`` with a block."""

    def gather(self, names: list[str]) -> list[list[str]]:
        """Names of each of the processes that store the blocks together."""


class HostBlocks:
    """Every block in host memory; on CUDA it is pinned, and copied on a stream of its own."""

    def __init__(self, layers: int, block_bytes: int, device: torch.device) -> None:
        self.room_bytes, self.kept = block_bytes, range(block_bytes)
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        try:
            self.tensors = [torch.empty(block_bytes, dtype=torch.uint8, pin_memory=cuda) for _ in range(layers)]
        except RuntimeError as fault:
            if not cuda:
                raise
            size, why = gibibytes(layers * block_bytes), str(fault).splitlines()[0]
            what = f"{size} of host memory for the blocks cannot be pinned ({why})"
            raise EnvironmentFault(
                what, "model.placement: host", "ask for more memory, or use shard or device"
            ) from fault

    def write(self, layer: int, begin: int, data: Tensor) -> None:
        self.tensors[layer][begin : begin + len(data)].copy_(data)

    def gather(self, names: list[str]) -> list[list[str]]:
        return [names]

    def fetch(self, layer: int, room: Tensor) -> Arrival:
        stream, source = self._stream, self.tensors[layer]
        if stream is None:
            room.copy_(source)
            return lambda: None
        stream.wait_stream(torch.cuda.current_stream(room.device))  # which may still read the room
        with torch.cuda.stream(stream):
            room.copy_(source, non_blocking=True)
        arrived = stream.record_event()
        return lambda: torch.cuda.current_stream(room.device).wait_event(arrived)


class ShardedBlocks:
    """One slice of each block on each rank's device; all ranks must fetch the same blocks in the same order."""

    def __init__(self, layers: int, block_bytes: int, device: torch.device, ranks: Ranks) -> None:
        part = -(-block_bytes // (ranks.size * ALIGNMENT)) * ALIGNMENT
        self.room_bytes, self.kept = part * ranks.size, range(part * ranks.rank, part * (ranks.rank + 1))
        self._ranks = ranks
        self.tensors = [torch.empty(part, dtype=torch.uint8, device=device) for _ in range(layers)]

    def write(self, layer: int, begin: int, data: Tensor) -> None:
        first, last = max(begin, self.kept.start), min(begin + len(data), self.kept.stop)
        if first < last:
            into = self.tensors[layer][first - self.kept.start : last - self.kept.start]
            into.copy_(data[first - begin : last - begin])

    def gather(self, names: list[str]) -> list[list[str]]:
        return self._ranks.gather(names)

    def fetch(self, layer: int, room: Tensor) -> Arrival:
        return self._ranks.all_gather_into(room, self.tensors[layer])
