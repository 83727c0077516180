"""Adjacent tensors as one: a matrix over the memory of several that lie behind one another, without a copy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor


def adjacent(parts: Sequence[Tensor]) -> Tensor | None:
    """The rows of several matrices as one matrix that shares their memory; None if they do not lie so on a CPU.

    It keeps that memory, whether theirs is one storage or each is mapped from a file.
    """
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        alike = part.is_contiguous() and part.dtype == first.dtype and part.shape[1:] == first.shape[1:]
        if not alike or part.device.type != "cpu" or part.data_ptr() != end:
            return None
        end += part.nbytes
    memory = (ctypes.c_char * (end - first.data_ptr())).from_address(first.data_ptr())
    memory.parts = [part.detach() for part in parts]  # type: ignore[attr-defined]  # a parameter may change its own
    return torch.frombuffer(memory, dtype=first.dtype).view(-1, *first.shape[1:])
