"""Streamed blocks: frozen weights that lie in host memory or on several ranks, and come to the device block by block.

The frozen tensors of a block lie end to end as bytes. They are brought into one of two rooms before the forward pass of
the block, and again before its backward pass; meanwhile the next block's are fetched into the other room. All blocks
share the rooms: parameters and the buffers of packed weights are views of a room, made once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamatune.model.block_stores import ALIGNMENT, Arrival, BlockStore, HostBlocks, ShardedBlocks
from llamatune.model.packed_weight import PackedWeight
from llamatune.model.transformer import Transformer
from llamatune.ranks import Ranks
from llamatune.shapes.llama_config import LlamaConfig, linear_module

_BLOCKS = "model.layers."


@dataclass(frozen=True)
class _Place:
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class BlockLayout:
    """Where each frozen tensor lies among the ``bytes`` of its block. All blocks are alike."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, packed: type[PackedWeight] | None) -> None:
        self.places: dict[str, _Place] = {}
        self.layers, self.bytes = config.num_hidden_layers, 0
        for name, shape in config.with_layers(1).parameter_shapes():
            if not name.startswith(_BLOCKS):
                continue
            _, path = _split(name)
            if packed is not None and linear_module(path):
                for key, (kind, stored) in packed.storage(shape).items():
                    self._add(f"{path}.{key}", kind, stored)
            else:
                self._add(path, dtype, shape)

    def _add(self, path: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.places[path] = place = _Place(self.bytes, dtype, shape)
        self.bytes += -(-place.bytes // ALIGNMENT) * ALIGNMENT


def _split(name: str) -> tuple[int, str]:
    """``model.layers.3.mlp.up_proj.weight`` -> 3, ``mlp.up_proj.weight``."""
    layer, _, path = name.removeprefix(_BLOCKS).partition(".")
    return int(layer), path


class StreamedBlocks:
    """The frozen tensors of all blocks in a ``store``, two rooms on the device, and what is in them.

    Filled tensor by tensor while the model is loaded, then put to work by ``attach``. Whatever runs the model goes
    through the blocks in order, and back; ``idle`` fetches what such a pass fetches.
    """

    def __init__(self, layout: BlockLayout, store: BlockStore, device: torch.device) -> None:
        self._layout, self._store = layout, store
        self._rooms = [
            torch.empty(store.room_bytes, dtype=torch.uint8, device=device) for _ in range(min(2, layout.layers))
        ]
        # Aliases without the views' version counter: autograd would refuse a weight that was fetched again.
        self._writable = [room.data for room in self._rooms]
        self._inside: list[int | None] = [None] * len(self._rooms)
        self._arrivals: list[Arrival | None] = [None] * len(self._rooms)

    @property
    def tensors(self) -> list[Tensor]:
        """What the blocks lie in, the rooms apart."""
        return self._store.tensors

    # Loading

    def named_anywhere(self, names: list[str]) -> list[str]:
        """Names of tensors, those of other ranks included; every rank has loaded its slices then."""
        return sorted({name for found in self._store.gather(names) for name in found})

    def rows_kept(self, name: str) -> range | None:
        """The rows of a tensor that this process stores, at least one; None of a tensor that is in no block."""
        if not name.startswith(_BLOCKS):
            return None
        place, kept = self._layout.places[_split(name)[1]], self._store.kept
        row = place.bytes // place.shape[0]
        first = max(0, min(place.shape[0] - 1, (kept.start - place.begin) // row))
        return range(first, max(first + 1, min(place.shape[0], -((place.begin - kept.stop) // row))))

    def hold(self, name: str, tensor: Tensor, first_row: int = 0) -> Tensor:
        """Store a tensor, or rows of it from ``first_row`` on; the view that takes the tensor's place in the model."""
        layer, path = _split(name)
        place = self._layout.places[path]
        assert tensor.dtype == place.dtype, name
        begin = place.begin + first_row * (place.bytes // place.shape[0] if place.shape else 0)
        self._store.write(layer, begin, tensor.contiguous().view(-1).view(torch.uint8))
        room = self._rooms[layer % len(self._rooms)]
        return room[place.begin : place.begin + place.bytes].view(place.dtype).view(place.shape)

    def hold_packed(self, name: str, weight: PackedWeight) -> None:
        """Store the tensors of a packed matrix and replace them by their views."""
        for key, tensor in list(weight.named_buffers()):
            setattr(weight, key, self.hold(f"{name}.{key}", tensor))

    # Running

    def attach(self, model: Transformer) -> None:
        """Let every block of ``model`` wait for its weights, forward and backward."""
        model.is_streamed = True
        for index, block in enumerate(model.model.layers):
            self.attach_to(block, index)

    def attach_to(self, block: nn.Module, index: int) -> None:
        """Let ``block`` wait for the weights of the block at ``index``."""
        before, after = _hooks(self, index)
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)

    def bring(self, index: int) -> None:
        """Wait for a block, whose weights are then in their places."""
        self.enter(index, index + 1)

    def enter(self, index: int, following: int) -> None:
        """Wait for a block, and begin to fetch the one that follows, if there is one."""
        self._fetch(index)
        self._arrive(index)
        if 0 <= following < self._layout.layers:
            self._fetch(following)

    def idle(self, backward: bool) -> None:
        """Fetch what a forward pass does, and the ``backward`` pass after it: another rank computes one."""
        for index in range(self._layout.layers):
            self.enter(index, index + 1)
        for index in reversed(range(self._layout.layers if backward else 0)):
            self.enter(index, index - 1)

    def _fetch(self, index: int) -> None:
        room = index % len(self._rooms)
        if self._inside[room] != index:
            self._arrive(index)  # of an earlier block in the same room
            self._inside[room] = None
            self._arrivals[room] = self._store.fetch(index, self._writable[room])
            self._inside[room] = index

    def _arrive(self, index: int) -> None:
        room = index % len(self._rooms)
        arrival, self._arrivals[room] = self._arrivals[room], None
        if arrival is not None:
            arrival()


def stream_blocks(
    placement: str,
    config: LlamaConfig,
    dtype: torch.dtype,
    packed: type[PackedWeight] | None,
    device: torch.device,
    ranks: Ranks,
) -> StreamedBlocks | None:
    """Empty room for a base's blocks where ``placement`` says, ``host`` or ``shard``; None: on the device.

    ``packed``: how the matrices are quantised; None: all is held in ``dtype``.
    """
    if placement not in ("host", "shard"):
        return None
    layout = BlockLayout(config, dtype, packed)
    size = layout.layers, layout.bytes
    store = HostBlocks(*size, device) if placement == "host" else ShardedBlocks(*size, device, ranks)
    return StreamedBlocks(layout, store, device)


def _hooks(blocks: StreamedBlocks, index: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """What runs before a block's forward pass, and after it: that lets its backward pass wait."""

    def again(_: Tensor) -> None:
        blocks.enter(index, index - 1)

    def before(_: nn.Module, __: Any) -> None:
        blocks.enter(index, index + 1)

    def after(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(again)  # type: ignore[no-untyped-call]

    return before, after
