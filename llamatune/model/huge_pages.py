"""Tensors in huge pages of memory, for weights that a CPU reads in every step of decoding.

With pages of 4 KiB a processor looks up an address for every few rows of a matrix, and reads ahead to the end of a page
alone. Linux gives pages of 2 MiB where a program asks for them (``madvise``), unless they are turned off.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_PAGE = 2 << 20
_LEAST = 64 << 20
"""Bytes of all tensors from which on they are read from memory; fewer stay in the caches."""
_ALIGNMENT = 64


class HugePages:
    """Room for tensors, one behind another, that is freed when none of them is left.

    ``size``: bytes of all, each with ``room_of`` it.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)
        if device.type == "cpu" and size >= _LEAST and hasattr(mmap, "MADV_HUGEPAGE"):
            self._free = _reserved(size)

    def copied(self, x: Tensor) -> Tensor:
        """A copy of ``x``, or ``x`` itself where there is no room for it."""
        size = x.numel() * x.itemsize
        if size > len(self._free):
            return x
        copy = self._free[:size].view(x.dtype).view(x.shape)
        self._free = self._free[room_of(size) :]
        return copy.copy_(x)


def room_of(size: int) -> int:
    """Bytes that a tensor of so many takes."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _reserved(size: int) -> Tensor:
    """Bytes from the start of a huge page on; none if the system does not give them."""
    try:
        memory = mmap.mmap(-1, size + _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return torch.empty(0, dtype=torch.uint8)
    room = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -room.data_ptr() % _PAGE
    return room[begin : begin + size]
