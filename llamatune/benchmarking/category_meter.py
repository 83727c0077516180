"""Measures memory by category (parameters, activations, ...) at the peak of training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from llamatune.benchmarking.results import CATEGORIES
from llamatune.benchmarking.step_meter import StorageMeter
from llamatune.errors import OutOfMemory
from llamatune.training.learner import Learner


class CategoryMeter(StorageMeter):  # type: ignore[no-untyped-call]
    """Follows the storages on the learner's device while whole steps run under it.

    ``peak_bytes`` is the largest sum of live storages, and ``categories()`` adds up to it.

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
        self._category: list[str] = []  # of each storage, by its number in the order of first sight
        self._number: dict[int, int] = {}  # of each storage that is alive, by its id
        self._log: list[tuple[int, int]] = []  # (number, change in bytes)
        self._peak_at = self._seen_allocated = 0
        self._from_forward: set[int] = set()  # alive, made in a forward pass that no backward pass followed yet
        self._existing: set[int] = set()  # made before the meter saw them
        self._in_backward = False
        self.assign("parameters", [*learner.model.parameters(), *learner.model.buffers()])
        self.assign("optimizer", learner.optimizer.state_tensors().values())

    def assign(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Set the category of tensors that exist already."""
        for tensor in tensors:
            self._add_existing(tensor.untyped_storage(), category)

    def categories(self) -> dict[str, int]:
        """Bytes of each category at the peak."""
        totals = dict.fromkeys(CATEGORIES, 0)
        for number, change in self._log[: self._peak_at]:
            totals[self._category[number]] += change
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
        given = [leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for storage in given:
            self._add_existing(storage, "temporary")
        result = super().__torch_dispatch__(func, types, args, kwargs)
        returned = {
            self._number[id(storage)]
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor) and id(storage := leaf.untyped_storage()) in self._number
        }
        if forward:
            self._from_forward |= returned - self._existing
        if func is torch.ops.aten._to_copy.default and self._is_parameter(given[0]):
            for number in returned - self._existing:
                self._category[number] = "casts"
        if self._allocator_peak is not None and (allocated := self._allocator_peak()) > self._seen_allocated:
            self._seen_allocated, self._peak_at = allocated, len(self._log)
        return result

    def _is_parameter(self, storage: torch.UntypedStorage) -> bool:
        number = self._number.get(id(storage))
        return number is not None and self._category[number] == "parameters"

    def _add_existing(self, storage: torch.UntypedStorage, category: str) -> None:
        if id(storage) in self._number or storage.device.type != self._learner.device.type:
            return
        self._follow(storage)
        number = self._number[id(storage)]
        self._category[number] = category
        self._existing.add(number)

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
        self._from_forward.discard(number)

    def _mark_activations(self) -> None:
        """Storages of a forward pass that are alive when a backward pass runs were kept for it."""
        for number in self._from_forward:
            if self._category[number] == "temporary":
                self._category[number] = "activations"
        self._from_forward.clear()

    def _mark_gradients(self) -> None:
        for parameter in self._learner.parameters.values():
            if parameter.grad is not None:
                number = self._number.get(id(parameter.grad.untyped_storage()))
                if number is not None:
                    self._category[number] = "gradients"
