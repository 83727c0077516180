"""Measures the peak memory of tensors: in all, and in training steps by category (parameters, activations, ...)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamatune.benchmarking.results import CATEGORIES
from llamatune.errors import OutOfMemory
from llamatune.training.model_and_optimizer import Learner


@dataclass(eq=False, slots=True)
class Followed:
    """A storage, or a tensor in oneDNN's layout, which has none, from the operation that first shows it until it is
    freed; ``existing``: it is older than that.
    """

    reference: weakref.ref[torch.UntypedStorage | Tensor]
    bytes: int = 0
    category: str = "temporary"
    existing: bool = False


class StorageMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages of all tensors that operations return; ``peak_bytes`` is the largest sum of live ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._alive: dict[int, Followed] = {}  # by the id of the storage

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.is_inference_mode_enabled():  # where composite operations come here whole
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._follow(_memory_of(tensor))
        return result

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that exist already."""
        for tensor in tensors:
            self._follow(_memory_of(tensor))

    def _follow(self, storage: torch.UntypedStorage | Tensor) -> None:
        key, size = id(storage), storage.nbytes if isinstance(storage, Tensor) else storage.nbytes()
        if key not in self._alive:
            self._alive[key] = Followed(weakref.ref(storage, lambda _: self._release(key)))
        followed = self._alive[key]
        if size != followed.bytes:  # new, or resized in place
            change, followed.bytes = size - followed.bytes, size
            self._change(followed, change)

    def _change(self, storage: Followed, size: int) -> None:
        """Count that a storage grew by ``size`` bytes; made and freed storages count as changes too."""
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _release(self, key: int) -> None:
        followed = self._alive.pop(key)
        self._change(followed, -followed.bytes)


class CategoryMeter(StorageMeter):  # type: ignore[no-untyped-call]
    """Follows the storages on the learner's device while whole steps run under it.

    Args:
        allocator_peak: returns the peak of the device's allocator so far; the moment at which it rose last is then
            taken as the peak. None: the peak is that of the live storages.
        limit_bytes: more live bytes than this raise ``OutOfMemory``.
    """

    def __init__(
        self, learner: Learner, allocator_peak: Callable[[], int] | None = None, limit_bytes: int | None = None
    ) -> None:
        super().__init__()
        self._learner, self._allocator_peak, self._limit_bytes = learner, allocator_peak, limit_bytes
        self._log: list[tuple[Followed, int]] = []  # changes in bytes
        self._peak_at = self._seen_allocated = 0
        self._from_forward: set[Followed] = set()  # alive, made in a forward pass that no backward pass followed yet
        self._in_backward = False
        self.assign("parameters", [*learner.model.parameters(), *learner.model.buffers()])
        self.assign("optimizer", learner.optimizer.state_tensors().values())

    def assign(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Set the category of tensors that exist already, unless they have one."""
        for storage in map(_memory_of, tensors):
            if id(storage) not in self._alive and storage.device.type == self._learner.device.type:
                self._follow(storage)
                followed = self._alive[id(storage)]
                followed.category, followed.existing = category, True

    def categories(self) -> dict[str, int]:
        """Bytes of each category at the peak."""
        totals = dict.fromkeys(CATEGORIES, 0)
        for storage, change in self._log[: self._peak_at]:
            totals[storage.category] += change
        return totals

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._mark_gradients()  # of a backward pass after which no operation was seen
        super().__exit__(kind, fault, traceback)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        in_backward = torch._C._current_graph_task_id() != -1
        # A recomputation runs within a backward pass and records operations for one of its own.
        forward = not in_backward or torch.is_grad_enabled()
        if not forward:
            self._mark_activations()
        if self._in_backward and not in_backward:
            self._mark_gradients()
        self._in_backward = in_backward
        self.assign("temporary", _tensors((args, kwargs)))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        made = [followed for followed in self._followed(result) if not followed.existing]
        if forward:
            self._from_forward.update(made)
        if func is torch.ops.aten._to_copy.default:
            from_parameter = any(source.category == "parameters" for source in self._followed(args[0]))
            for followed in made if from_parameter else ():
                followed.category = "casts"
        if self._allocator_peak is not None and (allocated := self._allocator_peak()) > self._seen_allocated:
            self._seen_allocated, self._peak_at = allocated, len(self._log)
        return result

    def _followed(self, values: Any) -> list[Followed]:
        """The storages of all tensors in nested ``values`` that are on the device."""
        keys = [id(_memory_of(tensor)) for tensor in _tensors(values)]
        return [self._alive[key] for key in keys if key in self._alive]

    def _follow(self, storage: torch.UntypedStorage | Tensor) -> None:
        if storage.device.type == self._learner.device.type:
            super()._follow(storage)

    def _change(self, storage: Followed, size: int) -> None:
        highest = self.peak_bytes
        super()._change(storage, size)
        self._log.append((storage, size))
        if self._allocator_peak is None and self.peak_bytes > highest:
            self._peak_at = len(self._log)
        if size > 0 and self._limit_bytes is not None and self.live_bytes > self._limit_bytes:
            raise OutOfMemory(
                f"out of memory: {self._limit_bytes:,} bytes are allowed, {self.live_bytes:,} would be held"
            )

    def _release(self, key: int) -> None:
        self._from_forward.discard(self._alive[key])
        super()._release(key)

    def _mark_activations(self) -> None:
        """Storages of a forward pass that are alive when a backward pass runs were kept for it."""
        for followed in self._from_forward:
            if followed.category == "temporary":
                followed.category = "activations"
        self._from_forward.clear()

    def _mark_gradients(self) -> None:
        for followed in self._followed([parameter.grad for parameter in self._learner.parameters.values()]):
            followed.category = "gradients"


def _memory_of(tensor: Tensor) -> torch.UntypedStorage | Tensor:
    """What holds its numbers, which other tensors may share."""
    return tensor if tensor.is_mkldnn else tensor.untyped_storage()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
