"""Which device computes, what it is prepared with, and what running out of its memory means."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from llamatune.errors import EnvironmentFault, OutOfMemory, SpecError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.free_memory import free_host_bytes, held_host_bytes
from llamatune.shapes.attention_kernels import OLDEST_WITH_BF16, Capability
from llamatune.units import gibibytes
from llamatune.versions import require_version

_DEVICE_IS_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")

_OLDEST_OF_CUDA_13: Capability = (7, 5)
_CUDA_12_BUILD = (
    "install torch 2.10 to 2.14 built for CUDA 12.6 (https://pytorch.org/get-started/previous-versions has the command)"
)
"""The last builds that hold kernels for compute capabilities 5.0 to 7.0."""
_ANY_BUILD = "install a build of torch for a newer CUDA (https://pytorch.org/get-started/locally)"


def choose_device(name: str, on_event: OnEvent = ignore_event) -> torch.device:
    """The device of that name, ready to compute: on CUDA the allocator's segments grow and attention leaves cuDNN out.

    ``auto`` is CUDA where there is one. A GPU that this build of torch has no kernels for is refused under ``auto``
    too: a run of hours on a GPU may take weeks on a CPU.

    Raises:
        EnvironmentFault: the device is absent, or torch has no kernels for it.
    """
    device = find_device(name, on_event)
    if device.type == "cuda":
        _refuse_unsupported(device)
        # cuDNN, torch's first choice on some GPUs, plans anew for each length: up to a second, at nearly every step.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def find_device(name: str, on_event: OnEvent = ignore_event) -> torch.device:
    """The device of that name, untouched, for whoever leaves it to another process."""
    require_version("torch", torch.__version__)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise SpecError(f"no device is called {name!r}", None, "use auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    _let_segments_grow()
    fault = cuda_fault()
    if name == "auto":
        if fault is not None:
            built = f"torch is built for CUDA {torch.version.cuda}"
            on_event(Notice(f"{built}, but finds no GPU ({fault}): this runs on the CPU", "warning"))
        return torch.device("cuda" if gpu_count() else "cpu")
    device = torch.device(name)
    count = gpu_count()
    if (device.index or 0) >= count:
        why = f" ({fault})" if fault else "" if torch.version.cuda else " (torch is built without CUDA)"
        raise EnvironmentFault(f"no device {name}; CUDA offers {count}{why}", None, "use another device, or cpu")
    return device


def _let_segments_grow() -> None:
    """Keep CUDA's allocator from losing memory to gaps, as rows differ in length; what the user set stays.

    torch reads this when CUDA starts, so nothing may ask CUDA for more than whether it is there before.
    """
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if not started and not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
        os.environ[_ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def gpu_count() -> int:
    """How many GPUs torch can compute on, or could if it had kernels for them."""
    with _torch_silenced():
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cuda_fault() -> str | None:
    """Why a torch that is built for CUDA finds no GPU; None: it finds one, or is built without."""
    if torch.version.cuda is None or gpu_count():
        return None
    driver = driver_version()
    if driver is not None and driver[0] < int(torch.version.cuda.split(".")[0]):
        return f"the driver knows CUDA only up to {driver[0]}.{driver[1]}; update it, or {_older_build(driver)}"
    try:
        with _torch_silenced():
            torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as fault:
        return str(fault).splitlines()[0].split(". ")[0].rstrip(".")
    return "no GPU is visible"


@contextlib.contextmanager
def _torch_silenced() -> Iterator[None]:
    """Without torch's warnings, of several lines, about what is told here in one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _older_build(driver: tuple[int, int]) -> str:
    return _CUDA_12_BUILD if driver[0] == 12 else "install a build of torch for its CUDA"


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the GPU driver knows, (12, 4); None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) or not version.value:
        return None
    return version.value // 1000, version.value % 1000 // 10


@functools.cache
def capability_of(device: torch.device) -> Capability | None:
    """The CUDA compute capability of this very device, not of the first; None of a CPU."""
    if device.type != "cuda":
        return None
    try:
        with _torch_silenced():
            return torch.cuda.get_device_capability(device)
    except RuntimeError as fault:
        raise EnvironmentFault(f"CUDA does not start: {str(fault).splitlines()[0]}", device, "use cpu") from fault


def lacks_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU without bf16; torch would emulate it there, slowly."""
    capability = capability_of(device)
    return capability is not None and capability < OLDEST_WITH_BF16


def has_kernels(capability: Capability, architectures: Sequence[str]) -> bool:
    """Whether a build for these ``architectures``, as ``torch.cuda.get_arch_list`` has them, runs on such a GPU.

    ``sm_86`` is machine code: for 8.6 and later ones of 8. ``compute_86`` is compiled by the driver: for 8.6 and all
    later ones. With an ``a`` either is for that one alone, with an ``f`` for its major version.
    """
    known = [found for name in architectures if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name))]
    return not known or any(_covers(capability, *found.groups()) for found in known)


def _covers(capability: Capability, kind: str, major: str, minor: str, only: str) -> bool:
    built = (int(major), int(minor))
    if only == "a":
        return capability == built
    return capability >= built and (capability[0] == built[0] or (kind == "compute" and not only))


def _refuse_unsupported(device: torch.device) -> None:
    capability, architectures = capability_of(device), torch.cuda.get_arch_list()
    if capability is None or has_kernels(capability, architectures):
        return
    built = f"torch {torch.__version__} has no kernels for it, only for {', '.join(architectures)}"
    raise EnvironmentFault(
        f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}; {built}",
        device,
        f"{build_for(capability)}, or use the device cpu (in the environment: CUDA_VISIBLE_DEVICES=)",
    )


def build_for(capability: Capability) -> str:
    """What to install for a GPU that the build at hand does not support."""
    if capability >= _OLDEST_OF_CUDA_13:
        return _ANY_BUILD
    return _CUDA_12_BUILD if capability >= (5, 0) else "use a newer GPU"


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
