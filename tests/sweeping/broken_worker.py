"""A worker process whose runs end in every kind of fault, or in a bug, by the rank of the adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from llamatune import errors
from llamatune.errors import LlamatuneError
from llamatune.sweeping import worker_processes

KINDS = (
    *(errors.SpecError, errors.DataError, errors.CheckpointError, errors.EnvironmentFault, errors.OutOfMemory),
    *(errors.NumericsError, errors.Stopped),
)


class OfTwo(Exception):
    """It cannot be made again of its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fault_of(rank: int) -> LlamatuneError:
    return KINDS[rank - 1](f"fault {rank}", Path("here") / str(rank), "do that")


def _train_together(members: Any, *_: Any, **__: Any) -> dict[str, Any]:
    for member in members:
        if member.spec.lora.alpha == 5:
            raise OfTwo(1, 2)
        if member.spec.lora.alpha == 6:
            raise OSError(28, "No space left on device", "there")
    warnings.warn("a library warns", UserWarning, stacklevel=1)

    class Own(Warning):
        """No other process can have it."""

    warnings.warn("a class of its own", Own, stacklevel=1)
    return {member.name: fault_of(member.spec.lora.r) for member in members}


def serve(descriptor: int) -> None:
    worker_processes.train_together = _train_together  # type: ignore[assignment]
    worker_processes.serve(descriptor)
