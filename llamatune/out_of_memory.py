"""Out-of-memory errors of torch and the host, and other failures of CUDA, as one line with what helps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from llamatune.errors import EnvironmentFault, OutOfMemory
from llamatune.host_memory import free_host_bytes, held_host_bytes
from llamatune.units import gibibytes

_DEVICE_IS_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def memory_faults(device: torch.device, advice: str | Callable[[], str]) -> Iterator[None]:
    """Raise ``OutOfMemory``, with ``advice``, where the block runs out of the device's or the host's memory.

    Where CUDA fails otherwise, raise ``EnvironmentFault``: after that no work is possible on the GPU in this process.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as fault:
        if isinstance(fault, torch.OutOfMemoryError) or any(text in str(fault) for text in _DEVICE_IS_FULL):
            free, size = torch.cuda.mem_get_info(device)
            sizes = {
                "allocated": torch.cuda.memory_allocated(device),
                "reserved": torch.cuda.memory_reserved(device),
                f"of {gibibytes(size)} free": free,
            }
        elif isinstance(fault, MemoryError) or "can't allocate memory" in str(fault):
            device = torch.device("cpu")
            sizes = held_host_bytes() | {"free": free_host_bytes()}
        elif isinstance(fault, torch.AcceleratorError) or "CUDA error" in str(fault):
            what = str(fault).partition("\n")[0].removeprefix("CUDA error: ")
            again = "run the same command again; if it fails again, see Xid in dmesg, or set CUDA_LAUNCH_BLOCKING=1"
            raise EnvironmentFault(f"CUDA failed: {what}", device, again) from fault
        else:
            raise
        shown = ", ".join(f"{gibibytes(size)} {name}" for name, size in sizes.items())
        todo = None
        with contextlib.suppress(MemoryError):  # computing the advice takes memory too
            todo = advice if isinstance(advice, str) else advice()
        raise OutOfMemory(f"out of memory on {device}: {shown}", None, todo) from fault
