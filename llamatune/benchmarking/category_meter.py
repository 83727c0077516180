"""What the memory of a step consists of when it is largest, by following the storages of its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llamatune.errors import OutOfMemory
from llamatune.training.memory_gate import StorageMeter
from llamatune.training.setup import Learner

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "casts", "temporary")
"""Each storage is in one of them, decided by its whole life.

``parameters`` are the base, the adapter and buffers; ``optimizer`` is its state; ``gradients`` are the storages that
were a trained tensor's ``.grad`` when a backward pass ended. ``casts`` are parameters in another dtype, which autocast
and autograd may keep. ``activations`` were made in a forward pass, or in a recomputation, and still there when the
backward pass went on. ``temporary`` is all the rest, the batch's token ids among it.
"""


class CategoryMeter(StorageMeter):  # type: ignore[no-untyped-call]
    """Follows the storages on the learner's device while whole steps are run under it.

    ``peak_bytes`` is the most that was alive at a time, and ``categories()`` adds up to it.

    Args:
        allocator_peak: tells the most that the device's allocator has held so far; the operation that raised it last is
            taken for the peak then. None: the peak is that of the live storages.
        limit_bytes: more live bytes than this are an ``OutOfMemory``.
    """

    def __init__(
        self, learner: Learner, allocator_peak: Callable[[], int] | None = None, limit_bytes: int | None = None
    ) -> None:
        super().__init__()
        self._learner, self._allocator_peak, self._limit_bytes = learner, allocator_peak, limit_bytes
        self._category: list[str] = []  # of each storage, in the order in which they were first seen
        self._number: dict[int, int] = {}  # of those that are alive
        self._log: list[tuple[int, int]] = []  # (number, bytes more or less)
        self._peak_at = self._seen_allocated = 0
        self._kept: set[int] = set()  # made in a forward pass; freed or kept, the backward pass will tell
        self._found: set[int] = set()  # older than the meter
        self._in_backward = False
        self.know("parameters", [*learner.model.parameters(), *learner.model.buffers()])
        self.know("optimizer", learner.optimizer.state_tensors().values())

    def know(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Say what storages are that exist already."""
        for tensor in tensors:
            self._find(tensor.untyped_storage(), category)

    def categories(self) -> dict[str, int]:
        """Bytes of each category at the peak."""
        held: Counter[int] = Counter()
        for number, size in self._log[: self._peak_at]:
            held[number] += size
        totals = dict.fromkeys(CATEGORIES, 0)
        for number, size in held.items():
            totals[self._category[number]] += size
        return totals

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._settle_gradients()  # of a backward pass that nothing followed
        super().__exit__(kind, fault, traceback)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        in_backward = torch._C._current_graph_task_id() != -1
        # A recomputation records its operations for a backward pass of its own, within one.
        forward = not in_backward or torch.is_grad_enabled()
        if not forward:
            self._settle_activations()
        if self._in_backward and not in_backward:
            self._settle_gradients()
        self._in_backward = in_backward
        given = [leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for storage in given:
            self._find(storage, "temporary")
        result = super().__torch_dispatch__(func, types, args, kwargs)
        returned = {
            self._number[id(storage)]
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor) and id(storage := leaf.untyped_storage()) in self._number
        }
        if forward:
            self._kept |= returned - self._found
        if func is torch.ops.aten._to_copy.default and self._is_parameter(given[0]):
            for number in returned - self._found:
                self._category[number] = "casts"
        if self._allocator_peak is not None and (allocated := self._allocator_peak()) > self._seen_allocated:
            self._seen_allocated, self._peak_at = allocated, len(self._log)
        return result

    def _is_parameter(self, storage: torch.UntypedStorage) -> bool:
        number = self._number.get(id(storage))
        return number is not None and self._category[number] == "parameters"

    def _find(self, storage: torch.UntypedStorage, category: str) -> None:
        if id(storage) in self._number or storage.device.type != self._learner.device.type:
            return
        self._follow(storage)
        number = self._number[id(storage)]
        self._category[number] = category
        self._found.add(number)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type == self._learner.device.type:
            super()._follow(storage)

    def _change(self, key: int, size: int) -> None:
        if key not in self._number:
            self._number[key] = len(self._category)
            self._category.append("temporary")
        highest = self.peak_bytes
        super()._change(key, size)
        self._log.append((self._number[key], size))
        if self._allocator_peak is None and self.peak_bytes > highest:
            self._peak_at = len(self._log)
        if size > 0 and self._limit_bytes is not None and self.live_bytes > self._limit_bytes:
            raise OutOfMemory(
                f"out of memory: {self._limit_bytes:,} bytes are allowed, {self.live_bytes:,} would be held"
            )

    def _release(self, key: int) -> None:
        super()._release(key)
        number = self._number.pop(key)
        self._kept.discard(number)

    def _settle_activations(self) -> None:
        """What forward passes made and is still alive was kept for the backward pass."""
        for number in self._kept:
            if self._category[number] == "temporary":
                self._category[number] = "activations"
        self._kept.clear()

    def _settle_gradients(self) -> None:
        for parameter in self._learner.parameters.values():
            if parameter.grad is not None:
                number = self._number.get(id(parameter.grad.untyped_storage()))
                if number is not None:
                    self._category[number] = "gradients"
