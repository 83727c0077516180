"""A pretended CUDA device under torch's CPU build, in a process of its own: tensors on `cuda` have no content.

``start`` comes before anything imports torch. Inside ``device_class()()`` tensors on the CPU are real and those on
`cuda` are fake (FakeTensorMode); what makes the host wait for a GPU is counted with its place in the package.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import llamatune  # which imports nothing

PACKAGE = Path(llamatune.__file__).parent
MEMORY_BYTES = 80 << 30


def start(library: str) -> None:
    """Load torch's C++ part and ``library``, then torch, which finds a device."""
    assert "torch" not in sys.modules
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    for path in (folder / "libtorch_global_deps.so", folder / "libtorch_cpu.so", Path(library)):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    import torch
    from torch._subclasses import fake_tensor

    # torch.tensor(..., device="cuda") makes a real tensor on the CPU first, and then copies it.
    torch._C._set_only_lift_cpu_tensors(True)
    fake_tensor.init_gpu_context = lambda *device: None  # type: ignore[assignment]
    # A GPU's tensor comes in one copy, one without content would be read number by number.
    fake_tensor.FakeTensor.tolist = lambda tensor: tensor.cpu().tolist()  # type: ignore[method-assign]


class CaptureFault(Exception):
    """What no CUDA graph can hold was done while one was captured."""


class Event:
    """What a stream has done; to await it is a wait."""

    def synchronize(self) -> None:
        _devices[-1].wait("an event awaited")


class Graph:
    """A CUDA graph, and ``torch.cuda.graph`` in one: nothing that waits or reads the host's tensors can be captured."""

    replays = 0
    """Of all graphs."""

    def replay(self) -> None:
        Graph.replays += 1

    @staticmethod
    @contextlib.contextmanager
    def capturing(graph: Graph, *how: object, **settings: object) -> Iterator[None]:
        _devices[-1].captures = True
        try:
            yield
        finally:
            _devices[-1].captures = False


_devices: list[Any] = []
"""Those that are in use, the innermost last."""


class Stream:
    """A CUDA stream as far as the package uses one: work on tensors without content needs no order."""

    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self) -> Event:
        return Event()


def install_gpu(capability: tuple[int, int]) -> None:
    """Let torch.cuda tell of one GPU of this compute capability."""
    import torch

    from llamatune import devices

    properties = SimpleNamespace(total_memory=MEMORY_BYTES, major=capability[0], minor=capability[1])
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_arch_list": list,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "a pretended GPU",
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (MEMORY_BYTES, MEMORY_BYTES),
        "manual_seed_all": lambda seed: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "max_memory_allocated": lambda device=None: 1,
        "max_memory_reserved": lambda device=None: 1,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": Graph.capturing,
        "graph_pool_handle": object,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    devices.capability_of.cache_clear()


def place() -> str:
    """``file.py:function`` of the innermost function of the package that runs, ``autograd`` if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            return f"{path.relative_to(PACKAGE)}:{frame.f_code.co_qualname.replace('.<locals>', '')}"
        frame = frame.f_back
    return "autograd"


def device_class() -> Any:
    """``PretendedDevice``; a function, because it needs torch."""
    import torch
    from torch import Tensor
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map

    aten = torch.ops.aten

    def device_of(leaf: Tensor | torch.device) -> torch.device:
        if isinstance(leaf, torch.device):
            return leaf
        return leaf.fake_device if isinstance(leaf, FakeTensor) else leaf.device

    class PretendedDevice(TorchDispatchMode):
        """Computes on the CPU for real and on `cuda` without content. What is read from there is 1.

        ``waits`` counts, by place and kind, what makes the host wait: tensors and numbers read from the device, copies
        to it that are not ``non_blocking``, and events. While a graph ``captures``, they are errors. An operation whose
        result has a shape that depends on values, which makes the host wait too (``nonzero``, a mask as an index),
        raises an error. ``libraries`` are those whose operations ran on the device, as ``aten``.
        """

        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # which would import the compiler

        def __init__(self) -> None:
            super().__init__()
            self.waits: Counter[tuple[str, str]] = Counter()
            self.libraries = set[str]()
            self.captures = False
            self._fake = FakeTensorMode()

        def __enter__(self) -> Any:
            _devices.append(self)
            return super().__enter__()

        def __exit__(self, *fault: Any) -> Any:
            _devices.pop()
            return super().__exit__(*fault)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.prim.device.default:  # which is asked more often than all others together
                return device_of(args[0])
            if torch.is_inference_mode_enabled():  # where composite operations come here whole
                with self:
                    result = func.decompose(*args, **(kwargs or {}))
                if result is not NotImplemented:
                    return result
            kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
            leaves = tree_leaves((args, kwargs))
            kinds = {device_of(leaf).type for leaf in leaves if isinstance(leaf, Tensor | torch.device)}
            if "cuda" not in kinds:
                return func(*args, **kwargs)
            if func is aten._local_scalar_dense.default:
                self.wait("a number read")
                return 1.0 if args[0].is_floating_point() else 1
            self.libraries.add(func.namespace)
            if func is aten._fused_dropout.default:
                args = args[:2]  # shapes are worked out without a generator
            into = args[0] if func is aten.copy_.default and device_of(args[0]).type == "cpu" else None
            with self._fake:
                if "cpu" in kinds:
                    args, kwargs = tree_map(self._without_content, (args, kwargs))
                if func is aten._scaled_mm.out:  # shapes are worked out of a new tensor alone
                    out = kwargs.pop("out")
                    result = aten.copy_.default(out, aten._scaled_mm.default(*args, **kwargs))
                else:
                    result = func(*args, **kwargs)
            if func not in (aten._to_copy.default, aten.copy_.default):
                return result
            waits = not (kwargs.get("non_blocking") or True in args[2:])
            if device_of(result).type == "cpu":
                if waits or func is aten._to_copy.default:  # whose memory is not pinned
                    self.wait("a copy to the host")
                return torch.ones(result.shape, dtype=result.dtype) if into is None else into.fill_(1)
            if "cpu" in kinds:
                if self.captures:
                    raise CaptureFault(f"a tensor of the host in {place()}")
                if waits:
                    self.wait("a copy to the device")
            return result

        def _without_content(self, leaf: Any) -> Any:
            real = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
            return self._fake.from_tensor(leaf) if real else leaf

        def wait(self, kind: str) -> None:
            """Count a wait."""
            if self.captures:
                raise CaptureFault(f"{kind} in {place()}")
            self.waits[place(), kind] += 1

    return PretendedDevice
