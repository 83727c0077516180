"""A merged model's weights, made while they are written: in fp32, rounded once, the effects of rounding counted."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from llamatune.checkpoints.adapter import Adapter
from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.tensor_bytes import is_finite
from llamatune.checkpoints.weights import Weight
from llamatune.errors import CheckpointError, Stopped
from llamatune.events import OnEvent, Progress, ShouldStop
from llamatune.model.torch_dtypes import DTYPE_NAMES

_AHEAD = 48
"""Portions that are made before they are written: some 50 MiB in 16 bits."""
_FOLDED_WEIGHTS = 1 << 17
"""Folded at once: their fp32 values stay in the processor's cache."""


class _Portion(NamedTuple):
    """Rows of a merged weight, and what rounding did to them."""

    weights: torch.Tensor
    error: float = 0.0
    changed: int = 0
    vanished: int = 0


@dataclass
class MergedWeights:
    """The merged model's weights by name, each made while it is written; counts the effects of rounding.

    ``order`` is that of the names in which they will be asked for: the workers begin with the next weight that changes
    while what comes before it is copied. Another order only takes longer.
    """

    checkpoint: Checkpoint
    adapter: Adapter
    dtype: torch.dtype | None
    workers: ThreadPoolExecutor
    order: Iterable[str]
    on_event: OnEvent
    should_stop: ShouldStop
    done: int = 0
    merged_tensors: int = 0
    max_abs_error: float = 0.0
    changed: int = 0
    vanished: int = 0
    not_finite: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changing = deque(name for name in self.order if self.adapter.changes(name))
        self._begun: dict[str, Iterator[torch.Tensor]] = {}
        self._asked: set[str] = set()

    def dtype_of(self, name: str) -> torch.dtype:
        return self.dtype or self.checkpoint.dtype(name)

    def __call__(self, name: str) -> Weight:
        if self.should_stop():
            raise Stopped("stopped while merging", self.checkpoint.path, "run the same command again")
        self.done += 1
        self._asked.add(name)
        self.on_event(Progress("merging", self.done, len(self.checkpoint.shapes)))
        if self.adapter.changes(name):
            self.merged_tensors += 1
            portions = self._begun.pop(name, None) or self._begin(name, self._fold)
            self._begin_next()
            return portions
        self._begin_next()
        if self.checkpoint.is_made(name) or self.dtype_of(name) != self.checkpoint.dtype(name):
            return self._begin(name, self._cast)
        return self.checkpoint.stored(name)

    def _begin_next(self) -> None:
        """Let the workers begin with the next weight that changes."""
        while not self._begun and self._changing:
            name = self._changing.popleft()
            if name not in self._asked:
                self._begun[name] = self._begin(name, self._fold)

    def _begin(self, name: str, make: Callable[..., _Portion]) -> Iterator[torch.Tensor]:
        """Portions of rows in order, some of them made ahead by the workers, who begin now."""
        read, dtype = self.checkpoint.row_reader(name), self.dtype_of(name)
        jobs = (self.workers.submit(make, name, read, rows, dtype) for rows in self.checkpoint.row_portions(name))
        return self._in_order(jobs, deque(itertools.islice(jobs, _AHEAD)))

    def _in_order(self, jobs: Iterator[Future[_Portion]], begun: deque[Future[_Portion]]) -> Iterator[torch.Tensor]:
        while begun:
            portion = begun.popleft().result()
            begun.extend(itertools.islice(jobs, 1))
            yield self._counted(portion)

    def _counted(self, portion: _Portion) -> torch.Tensor:
        self.max_abs_error = max(self.max_abs_error, portion.error)
        self.changed += portion.changed
        self.vanished += portion.vanished
        return portion.weights

    def _cast(self, name: str, read: Callable[[slice], torch.Tensor], rows: slice, dtype: torch.dtype) -> _Portion:
        W = read(rows)
        result = W.to(dtype)
        if not is_finite(result):
            self._refuse_overflow(name, W, dtype)
        return _Portion(result)

    def _fold(self, name: str, read: Callable[[slice], torch.Tensor], rows: slice, dtype: torch.dtype) -> _Portion:
        base = read(rows)
        made = _Portion(torch.empty(base.shape, dtype=dtype))
        step = max(1, _FOLDED_WEIGHTS // math.prod(base.shape[1:]))
        scratch = torch.empty(3, min(step, len(base)), *base.shape[1:])  # the same memory for each part
        for first in range(0, len(base), step):
            part = slice(first, min(first + step, len(base)))
            W = base[part]
            wide, rounded, rounding = scratch[:, : len(W)]
            wide.copy_(W)
            exact = self.adapter.merged(name, wide, slice(rows.start + part.start, rows.start + part.stop))
            rounded.copy_(made.weights[part].copy_(exact))
            torch.sub(exact, rounded, out=rounding)
            error = max(float(rounding.amax()), -float(rounding.amin()))
            if not error < float("inf"):  # infinity, or NaN
                self._refuse_overflow(name, exact, dtype)
                self._refuse_broken_merge(name, W, exact)
                error = 0.0
            # What the adapter leaves as it is, rounding leaves too. Counted in fp32, quicker than booleans are.
            changed = int(exact.ne_(wide).sum())
            kept = int(rounded.ne_(wide if dtype == W.dtype else W.to(dtype).float()).sum())
            made = _Portion(
                made.weights, max(made.error, error), made.changed + changed, made.vanished + changed - kept
            )
        return made

    def _refuse_broken_merge(self, name: str, base: torch.Tensor, exact: torch.Tensor) -> None:
        """Refuse what is not finite only since the adapter, whose tensors are finite, was added."""
        if is_finite(base) and not is_finite(exact):
            what = f"{name} would hold NaN or infinity, which the base does not"
            raise CheckpointError(what, self.adapter.path, "its scaling, or --weights, is too large for fp32")

    def _refuse_overflow(self, name: str, exact: torch.Tensor, dtype: torch.dtype) -> None:
        """Refuse finite weights that would become infinite; a base that holds NaN itself is only noted."""
        largest = float(exact.float().nan_to_num(0.0, 0.0, 0.0).abs().max())
        if largest > torch.finfo(dtype).max:
            what = f"{name} holds {largest:g}, which {DTYPE_NAMES[dtype]} cannot hold"
            raise CheckpointError(what, self.checkpoint.path, "choose another --dtype")
        if name not in self.not_finite:
            self.not_finite.append(name)
