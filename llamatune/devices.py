"""Which device computes, and what running out of its memory means."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from llamatune.errors import EnvironmentFault, OutOfMemory, SpecError
from llamatune.free_memory import free_host_bytes
from llamatune.versions import require_version


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
def memory_faults(
    device: torch.device,
    advice: str = "lower training.micro_batch_size, set training.activation_checkpointing: block, "
    "or use a 16-bit model.dtype",
) -> Iterator[None]:
    """Turn running out of memory into one line with what was held and what helps."""
    try:
        yield
    except torch.OutOfMemoryError as fault:
        held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        raise OutOfMemory(
            f"out of memory on {device}: {held / 2**30:.2f} GiB allocated, {reserved / 2**30:.2f} GiB reserved",
            None,
            advice,
        ) from fault
    except MemoryError as fault:
        raise OutOfMemory("out of memory on the host", None, advice) from fault
    except RuntimeError as fault:
        if "can't allocate memory" not in str(fault):
            raise
        raise OutOfMemory("out of memory on the host", None, advice) from fault
