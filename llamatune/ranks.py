"""Ranks: the processes of one run and what they send each other; one process sends nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """One process of ``size``. With one process, every method returns at once and no process group exists."""

    rank, size, local_rank = 0, 1, 0

    @property
    def is_first(self) -> bool:
        """Whether this rank writes, draws and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share of ``items``: every ``size``-th, beginning at ``rank``."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Return when every rank has come here, however long the work of one takes."""

    def ask_to_stop(self) -> None:
        """Pass a signal on to rank 0, which gets a SIGTERM within seconds."""

    def from_first(self, value: T) -> T:
        """Rank 0's ``value``, which must be JSON."""
        return value

    def gather(self, value: T) -> list[T]:
        """The JSON ``value`` of each rank."""
        return [value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return any(self.gather(flag))

    def exchanging(self) -> contextlib.AbstractContextManager[None]:
        """Around code of torch that sends messages over its default group: their failures become ``LlamatuneError``."""
        return contextlib.nullcontext()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, of one shape, stacked: (size, ...)."""
        return tensor[None]

    def all_gather_into(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
        """Begin to fill ``whole`` with the ``part`` of each rank, end to end; what is returned waits for the end."""
        whole.copy_(part)
        return lambda: None

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace ``tensor`` by the sum over all ranks, added in any order."""

    def all_to_all(self, tensors: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
        """Send ``tensors[r]`` to rank r, and empty ``tensors``; what each rank r sent here has shape ``shapes[r]``."""
        return tensors


ALONE = Ranks()
