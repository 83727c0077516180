"""CUDA graphs played on a CPU: the operations of a step are recorded with their tensors, and repeated on these.

As in a graph, addresses, shapes and the host's numbers are those of the capture; Python code of the step does not run
again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamatune.inference.captured_steps import Run

_OF_THE_HOST = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default}
"""A number read, and a tensor made of numbers: no graph holds them."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _OF_THE_HOST, f"{func} in a captured step"
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        new = [x for x in made if x.untyped_storage().data_ptr() not in given]
        assert len(new) in (0, len(made)), func
        if new or func._schema.is_mutable:  # else it gave views, which stay what they are
            self.calls.append((func, args, kwargs, new))
        return result

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            result = func(*args, **kwargs)
            for held, again in zip(outputs, tree_leaves(result) if outputs else (), strict=True):
                held.copy_(again)


class RecordedGraphs:
    """``log``: ``captured``, ``launched`` and ``cleared``, in their order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def capture(self, step: Run) -> Run:
        step()
        with _Recorder() as recorder:
            step()
        self.log.append("captured")

        def launch() -> None:
            self.log.append("launched")
            recorder.replay()

        return launch

    def clear(self) -> None:
        self.log.append("cleared")
