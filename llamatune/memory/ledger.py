"""A ledger of tensors: code is walked by what it makes and frees, and the most bytes that are alive come out of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

Tensor = int
"""What the ledger calls a tensor that it follows."""

Passes = Iterator[None]
"""A walk through a part of the code: the forward pass up to a ``yield``, then the backward pass, which frees all.

Where nothing is kept, the input is the caller's.
"""
Walk: TypeAlias = "Callable[[Ledger], Passes]"


@dataclass(frozen=True)
class Moment:
    """The highest moment of one step of a walk: its bytes, and the names and bytes of the tensors alive there."""

    step: str
    bytes: int
    tensors: tuple[tuple[str, int], ...]


class Ledger:
    """What is alive in a walk, and the highest moment of each of its steps so far."""

    def __init__(self) -> None:
        self._moments: list[Moment] = []
        self.live_bytes = 0
        self._keeping = True
        self._alive: dict[Tensor, tuple[str, int]] = {}
        self._made = 0
        self._step = ""
        self._highest: int = 0
        self._then: tuple[tuple[str, int], ...] = ()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Lines of the code whose highest moment is one row of the table; a step inside another bears both names."""
        outer = self._step
        self._close()
        self._step = f"{outer}: {name}" if outer else name
        yield
        self._close()
        self._step = outer

    @contextlib.contextmanager
    def keeping_nothing(self) -> Iterator[None]:
        """A forward pass that is run again later: it keeps nothing for the backward pass."""
        self._keeping = False
        yield
        self._keeping = True

    def make(self, name: str, size: int) -> Tensor:
        """A tensor of ``size`` bytes, alive until it is freed."""
        self._made += 1
        self._alive[self._made] = name, size
        self.live_bytes += size
        if self.live_bytes > self._highest:
            self._highest, self._then = self.live_bytes, self.alive()
        return self._made

    def keep(self, name: str, size: int) -> Tensor:
        """A tensor that is kept for the backward pass, of no bytes where nothing is kept."""
        return self.make(name, size if self._keeping else 0)

    def free(self, *tensors: Tensor) -> None:
        """These are alive no more."""
        for tensor in tensors:
            self.live_bytes -= self._alive.pop(tensor)[1]

    def use(self, name: str, size: int) -> None:
        """Make a tensor and free it at once."""
        self.free(self.make(name, size))

    def alive(self) -> tuple[tuple[str, int], ...]:
        """The names and bytes of what is alive."""
        return tuple(self._alive.values())

    def take_moments(self) -> tuple[Moment, ...]:
        """The highest moments of the steps since the last call."""
        moments, self._moments = tuple(self._moments), []
        return moments

    def _close(self) -> None:
        """End the step so far, if anything was made in it."""
        if self._step and self._highest:
            self._moments.append(Moment(self._step, self._highest, self._then))
        self._highest = 0


@dataclass(frozen=True)
class Part:
    """One part of a step (half a block, a block or the head), walked by itself, to be placed beside what else is alive.

    ``kept`` is alive from its forward to its backward pass, its input included, and counts in both passes' moments.
    ``gradients`` are those of its trained tensors; ``cached`` are casts of matrices that stay until autocast ends.
    """

    name: str
    kept: tuple[tuple[str, int], ...]
    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    kept_bytes: int
    forward_peak: int
    backward_peak: int
    gradients: int
    cached: int

    @classmethod
    def of(cls, name: str, walk: Walk, gradients: int, cached: int = 0) -> Part:
        """Walk forward, then backward."""
        ledger = Ledger()
        passes = walk(ledger)
        next(passes)
        kept, kept_bytes, forward = ledger.alive(), ledger.live_bytes, ledger.take_moments()
        next(passes, None)
        backward = ledger.take_moments()
        assert not ledger.live_bytes, f"{name}: still alive after the backward pass: {ledger.alive()}"
        forward_peak, backward_peak = (max(moment.bytes for moment in passed) for passed in (forward, backward))
        return cls(name, kept, forward, backward, kept_bytes, forward_peak, backward_peak, gradients, cached)

    @classmethod
    def moment(cls, name: str, step: str, tensors: str, size: int) -> Part:
        """A part of one moment, without a forward pass."""
        return cls(name, (), (), (Moment(step, size, ((tensors, size),)),), 0, 0, size, 0, 0)
