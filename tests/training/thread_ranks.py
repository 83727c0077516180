"""Ranks that are threads of this process. They share torch's global generator, so nothing may be drawn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from llamatune.ranks import Ranks

R = TypeVar("R")


class ThreadRanks(Ranks):
    """One rank; all have ``messages`` and ``barrier`` in common."""

    def __init__(self, rank: int, size: int, messages: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._messages, self._barrier = rank, size, messages, barrier

    def _exchange(self, message: Any) -> list[Any]:
        self._messages[self.rank] = message
        self._barrier.wait(20)
        everybodys = list(self._messages)
        self._barrier.wait(20)
        self._messages[self.rank] = None
        return everybodys

    def wait(self) -> None:
        self._exchange(None)

    def gather(self, value: Any) -> list[Any]:
        return self._exchange(value)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange(tensor))

    def all_gather_into(self, whole: Tensor, part: Tensor) -> Callable[[], None]:
        """What arrives is there no sooner than it is waited for; until then the room holds no number."""
        parts = self._exchange(part)
        whole.fill_(255)

        def wait() -> None:
            for into, arrived in zip(whole.chunk(self.size), parts, strict=True):
                into.copy_(arrived)

        return wait

    def all_to_all(self, tensors: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
        received = [sent[self.rank] for sent in self._exchange(tensors)]
        assert [tensor.shape for tensor in received] == shapes
        return received


def in_threads(size: int, work: Callable[[Ranks], R]) -> list[R]:
    """What ``work`` returns on each of ``size`` ranks; the first fault of one is raised."""
    messages, barrier = [None] * size, threading.Barrier(size)
    results: list[Any] = [None] * size
    faults: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, size, messages, barrier))
        except BaseException as fault:
            if not isinstance(fault, threading.BrokenBarrierError):
                faults.append(fault)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]
    return results
