"""Which device computes, and what running out of its memory means."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from llamatune.errors import EnvironmentFault, SpecError


def choose_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one; a device that is asked for and absent is an ``EnvironmentFault``."""
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


@contextlib.contextmanager
def memory_faults(device: torch.device) -> Iterator[None]:
    """Turn running out of memory into one line with what was held and what helps."""
    advice = (
        "lower training.micro_batch_size, set training.activation_checkpointing: block, or use a 16-bit model.dtype"
    )
    try:
        yield
    except torch.OutOfMemoryError as fault:
        held, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        raise EnvironmentFault(
            f"out of memory on {device}: {held / 2**30:.2f} GiB allocated, {reserved / 2**30:.2f} GiB reserved",
            None,
            advice,
        ) from fault
    except MemoryError as fault:
        raise EnvironmentFault("out of memory on the host", None, advice) from fault
    except RuntimeError as fault:
        if "can't allocate memory" not in str(fault):
            raise
        raise EnvironmentFault("out of memory on the host", None, advice) from fault
