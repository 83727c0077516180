"""Device choice: CPU or CUDA, allocator settings, compute capability, memory size."""

from __future__ import annotations

import functools
import os
import re

import torch

from llamatune.errors import EnvironmentFault, SpecError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.free_memory import free_host_bytes
from llamatune.shapes.attention_kernels import OLDEST_WITH_BF16, Capability
from llamatune.torch_build import cuda_fault, gpu_count, refuse_unsupported, torch_silenced
from llamatune.versions import require_version


def choose_device(name: str, on_event: OnEvent = ignore_event) -> torch.device:
    """The device of that name, prepared: on CUDA with the allocator's expandable segments and without cuDNN attention.

    ``auto`` is CUDA where there is a GPU. A GPU that this build of torch has no kernels for is refused under ``auto``
    too: a run of hours on a GPU may take weeks on a CPU.

    Raises:
        EnvironmentFault: the device is absent, or torch has no kernels for it.
    """
    device = find_device(name, on_event)
    capability = capability_of(device)
    if capability is not None:
        refuse_unsupported(device, capability)
        # cuDNN, torch's first choice on some GPUs, plans anew for each length: up to a second, at nearly every step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def find_device(name: str, on_event: OnEvent = ignore_event) -> torch.device:
    """The device of that name, not prepared: for a caller that leaves it to another process."""
    require_version("torch", torch.__version__)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise SpecError(f"no device is called {name!r}", None, "use auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    _use_expandable_segments()
    fault, count = cuda_fault(), gpu_count()
    if name == "auto":
        if fault is not None:
            built = f"torch is built for CUDA {torch.version.cuda}"
            on_event(Notice(f"{built}, but finds no GPU ({fault}): this runs on the CPU", "warning"))
        return torch.device("cuda" if count else "cpu")
    device = torch.device(name)
    if (device.index or 0) >= count:
        why = f" ({fault})" if fault else "" if torch.version.cuda else " (torch is built without CUDA)"
        raise EnvironmentFault(f"no device {name}; CUDA offers {count}{why}", None, "use another device, or cpu")
    return device


def _use_expandable_segments() -> None:
    """Let CUDA's allocator grow its segments: rows differ in length, and fixed ones fragment. The user's setting stays.

    torch reads the variable when CUDA starts, so only whether there is a GPU may be asked of CUDA before.
    """
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if not started and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@functools.cache
def capability_of(device: torch.device) -> Capability | None:
    """The CUDA compute capability of this device (not of the first one); None of a CPU."""
    if device.type != "cuda":
        return None
    try:
        with torch_silenced():
            return torch.cuda.get_device_capability(device)
    except RuntimeError as fault:
        raise EnvironmentFault(f"CUDA does not start: {str(fault).splitlines()[0]}", device, "use cpu") from fault


def lacks_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU without bf16; torch would emulate it there, slowly."""
    capability = capability_of(device)
    return capability is not None and capability < OLDEST_WITH_BF16


def memory_size_bytes(device: torch.device) -> int:
    """How much memory the device has; for the CPU, that of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory_bytes(device: torch.device) -> int:
    """Free memory of the device; for the CPU, what the machine and its control groups leave to this process."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()
