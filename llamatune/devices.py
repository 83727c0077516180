"""Which device computes, and what running out of its memory means."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator

import torch

from llamatune.errors import EnvironmentFault, OutOfMemory, SpecError
from llamatune.free_memory import free_host_bytes, held_host_bytes
from llamatune.units import gibibytes
from llamatune.versions import require_version

_DEVICE_IS_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one; a device that is asked for and absent is an ``EnvironmentFault``."""
    require_version("torch", torch.__version__)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise SpecError(f"no device is called {name!r}", None, "use auto, cpu, cuda or cuda:N")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise EnvironmentFault(f"no device {name}; CUDA offers {count}", None, "use another device, or cpu")
    return device


def memory_size_bytes(device: torch.device) -> int:
    """How much memory the device has; of the CPU, the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory_bytes(device: torch.device) -> int:
    """What is still free on ``device``; on the CPU what the machine and its control groups leave to this process."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()


@contextlib.contextmanager
def memory_faults(device: torch.device, advice: str | Callable[[], str]) -> Iterator[None]:
    """Turn running out of memory into one line: what was held, allocated and reserved apart, and what helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as fault:
        if isinstance(fault, torch.OutOfMemoryError) or any(text in str(fault) for text in _DEVICE_IS_FULL):
            free, size = torch.cuda.mem_get_info(device)
            held = {
                "allocated": torch.cuda.memory_allocated(device),
                "reserved": torch.cuda.memory_reserved(device),
                f"of {gibibytes(size)} free": free,
            }
        elif isinstance(fault, MemoryError) or "can't allocate memory" in str(fault):
            device = torch.device("cpu")
            held = held_host_bytes() | {"free": free_host_bytes()}
        else:
            raise
        told = ", ".join(f"{gibibytes(held_bytes)} {what}" for what, held_bytes in held.items())
        raise OutOfMemory(f"out of memory on {device}: {told}", None, _told(advice)) from fault


def _told(advice: str | Callable[[], str]) -> str | None:
    try:
        return advice if isinstance(advice, str) else advice()
    except MemoryError:  # there is not even room to think
        return None
