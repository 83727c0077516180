"""Whether Triton kernels run in place of plain torch functions (``training.kernels``), and which functions have one.

Triton is imported with the first kernel. It comes with torch's builds for CUDA.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from llamatune.devices import capability_of
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.shapes.capabilities import OLDEST_FOR_TRITON

F = TypeVar("F", bound=Callable[..., Any])

_device_type: str | None = None
"""The type of device on which kernels run now; None: they do not."""


def by_kernel(file: str) -> Callable[[F], F]:
    """While kernels run, compute a function of tensors by the one of the same name in ``kernels/<file>.py``.

    Its first argument, a tensor or a list of some, says on which device.
    """

    def decorate(plain: F) -> F:
        @functools.wraps(plain)
        def run(*args: Any, **options: Any) -> Any:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            if not kernels_run_on(first):
                return plain(*args, **options)
            return _kernel(file, plain.__name__)(*args, **options)

        run.kernel = file  # type: ignore[attr-defined]  # for the test that each plain function has its kernel
        return run  # type: ignore[return-value]

    return decorate


def kernels_run_on(x: Tensor) -> bool:
    """Whether ``x`` lies where kernels run now. They have no autograd of their own, and compute in fp32."""
    return x.device.type == _device_type and not torch.is_grad_enabled() and x.dtype != torch.float64


@functools.cache
def _kernel(file: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(importlib.import_module(f"llamatune.model.kernels.{file}"), name)
    return found


@contextlib.contextmanager
def running_kernels(device_type: str | None) -> Iterator[None]:
    """Have kernels run on this type of device within the block, in all threads: autograd has its own for a GPU."""
    global _device_type
    before, _device_type = _device_type, device_type
    try:
        yield
    finally:
        _device_type = before


@contextlib.contextmanager
def chosen_kernels(wanted: str, device: torch.device, on_event: OnEvent = ignore_event) -> Iterator[str]:
    """``auto``: run kernels within the block if the device can, with a warning if Triton alone fails. Or ``plain``.

    Gives the one of the two that describes what runs.
    """
    able = wanted == "auto" and triton_runs_on(device)
    fault = kernel_fault(device) if able else None
    if fault is not None:
        what = f"Triton's kernels do not run here ({fault})"
        on_event(Notice(f"{what}: plain torch functions take their place, which are slower", "warning"))
    runs = able and fault is None
    with running_kernels("cuda" if runs else None):
        yield "auto" if runs else "plain"


def triton_runs_on(device: torch.device) -> bool:
    """Whether the device is a GPU that kernels are for."""
    capability = capability_of(device)
    return capability is not None and capability >= OLDEST_FOR_TRITON


@functools.cache
def kernel_fault(device: torch.device) -> str | None:
    """Why a small kernel does not run on this GPU, as for want of a C compiler, in one line; None: it does."""
    try:
        x = torch.ones(1, 16, device=device)
        _kernel("swiglu", "swiglu")(x, x)
        torch.cuda.synchronize(device)
    except Exception as fault:  # Triton raises errors of many kinds, those of compilers among them
        return (str(fault).strip() or type(fault).__name__).splitlines()[0]
    return None


def kernels_in_use() -> str:
    """``triton 3.8.0`` or ``plain``, for records: the two round differently."""
    return "plain" if _device_type is None else f"triton {importlib.metadata.version('triton')}"
