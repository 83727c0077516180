"""Search for the tensor that makes logits infinite or NaN: of a base, or of an adapter on it.

It reads every weight, so it is for a fault that has happened.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from llamatune.checkpoints.adapter import Adapter
from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.errors import LlamatuneError, NumericsError

_ABSURD = 1e4
"""A magnitude that no weight of a trained model has."""


class BrokenTensor(NumericsError):
    """A fault with the tensor that explains it."""


def find_broken(checkpoint: Checkpoint, adapters: Sequence[Adapter] = ()) -> tuple[str, Path] | None:
    """What is wrong with which tensor, and its file; None if all are finite and of usual magnitude.

    The first tensor with NaN or infinity; else the one of the largest magnitude, if that is absurd. What cannot be read
    is passed over: the fault that is being explained is another one.
    """
    worst, found = _ABSURD, None
    for adapter in adapters:
        file = adapter.path or Path("adapter")
        for name, tensor in adapter.tensors.items():
            size = _magnitude(tensor)
            if size > worst:
                worst, found = size, (name, file if adapter.header is None else adapter.header.file)
    for name, parts in checkpoint.parts.items():
        if worst == math.inf:
            break
        try:
            read = checkpoint.row_reader(name)
            size = max((_magnitude(read(rows)) for rows in checkpoint.row_portions(name)), default=0.0)
        except (LlamatuneError, OSError):
            continue
        if size > worst:
            worst, found = size, (name, parts[0].path)
    if found is None:
        return None
    name, file = found
    held = "holds NaN or infinity" if worst == math.inf else f"holds a weight of magnitude {worst:.3g}"
    return f"{name} {held}", file


def with_broken_tensor(fault: NumericsError, checkpoint: Checkpoint, adapters: Sequence[Adapter] = ()) -> NumericsError:
    """``fault`` with the tensor that explains it, if one does."""
    found = None if isinstance(fault, BrokenTensor) else find_broken(checkpoint, adapters)
    if found is None:
        return fault
    what, file = found
    return BrokenTensor(f"{fault.what}: {what} in {file}", fault.where, fault.todo)


def _magnitude(tensor: torch.Tensor) -> float:
    """The largest one; infinity also for NaN."""
    if not tensor.numel():
        return 0.0
    least, most = (float(value) for value in tensor.aminmax())
    size = max(abs(least), abs(most))
    return size if math.isfinite(least) and math.isfinite(most) else math.inf
