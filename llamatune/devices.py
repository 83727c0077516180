"""Device choice: CPU or CUDA, allocator settings, memory size; GPUs that driver and torch support."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import warnings

import torch

from llamatune.errors import EnvironmentFault, SpecError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.host_memory import free_host_bytes
from llamatune.nvml import NvmlGpu, nvml
from llamatune.processor import core_count, processor_name
from llamatune.required_versions import at_least, require_version
from llamatune.shapes.capabilities import OLDEST_WITH_BF16, Capability
from llamatune.shapes.torch_builds import build_for, build_for_driver, has_kernels

_GET_NVML = "for NVML start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility, or install the driver's"


def choose_device(name: str, on_event: OnEvent = ignore_event, local_rank: int | None = None) -> torch.device:
    """The device of that name, prepared: on CUDA with the allocator's expandable segments and without cuDNN attention.

    ``auto`` is CUDA where there is a GPU. A GPU that this build of torch has no kernels for is refused under ``auto``
    too: a run of hours on a GPU may take weeks on a CPU. ``local_rank``: which of a node's ranks this is, None for a
    process on its own; each takes its own GPU, and it becomes CUDA's current one.

    Raises:
        EnvironmentFault: the device is absent, torch has no kernels for it, or there are fewer GPUs than ranks.
        SpecError: a GPU is named, but the node's ranks need one each.
    """
    device = find_device(name, on_event)
    if local_rank is not None and device.type == "cuda":
        device = _gpu_of_rank(device, local_rank)
    capability = capability_of(device)
    if capability is not None:
        architectures = torch.cuda.get_arch_list()
        if not has_kernels(capability, architectures):
            gpu = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
            built = f"torch {torch.__version__} has no kernels for it, only for {', '.join(architectures)}"
            install = build_for(capability, driver_version())
            todo = f"{install}, or use the device cpu (in the environment: CUDA_VISIBLE_DEVICES=)"
            raise EnvironmentFault(f"{gpu}; {built}", device, todo)
        # cuDNN, torch's first choice on some GPUs, plans anew for each length: up to a second, at nearly every step.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if local_rank is not None:
            torch.cuda.set_device(device)  # which NCCL uses
    return device


def _gpu_of_rank(device: torch.device, local_rank: int) -> torch.device:
    """The GPU of a node's rank, among those that this process sees.

    One alone is taken whatever the rank: schedulers show each process its own. Whether other ranks see the same one
    cannot be known here.
    """
    if device.index is not None:
        if local_rank > 0:
            raise SpecError("the ranks of a node need a GPU each, not one", f"device {device}", "use auto or cuda")
        return device
    count = gpu_count()
    if 1 < count <= local_rank:
        what = f"CUDA offers {count} GPUs to at least {local_rank + 1} ranks of this node"
        raise EnvironmentFault(what, None, "start one rank for each GPU")
    return torch.device("cuda", local_rank if count > 1 else 0)


def find_device(name: str, on_event: OnEvent = ignore_event) -> torch.device:
    """The device of that name, not prepared: for a caller that leaves it to another process."""
    require_version("torch", torch.__version__)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise SpecError(f"no device is called {name!r}", None, "use auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if not started:
        _set_allocator()
    fault, count = cuda_fault(), gpu_count()
    if name == "auto":
        if fault is not None:
            built = f"torch is built for CUDA {torch.version.cuda}"
            on_event(Notice(f"{built}, but finds no GPU ({fault}): this runs on the CPU", "warning"))
        device = torch.device("cuda" if count else "cpu")
    else:
        device = torch.device(name)
        if (device.index or 0) >= count:
            why = f" ({fault})" if fault else "" if torch.version.cuda else " (torch is built without CUDA)"
            raise EnvironmentFault(f"no device {name}; CUDA offers {count}{why}", None, "use another device, or cpu")
    if device.type == "cuda" and not started:
        _report_fixed_segments(on_event)
    return device


_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def _set_allocator() -> None:
    """Have torch's allocator grow its segments where it can: rows differ in length, and fixed segments fragment.

    The user's setting stays. torch reads the variable when CUDA starts, so nothing may be asked of CUDA before.
    """
    if growth_fault() is None:
        if not any(name in os.environ for name in _ALLOCATOR_SETTINGS):
            os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
        # torch asks NVML what only a GPU of 9.0 and later has, warns of the others, and goes on as it should.
        warnings.filterwarnings("ignore", "nvmlDeviceGetGpuFabricInfoV failed")


def _report_fixed_segments(on_event: OnEvent) -> None:
    """Warn if the segments cannot grow; refuse a setting of the user's with which torch would crash."""
    fault = growth_fault()
    if fault is None:
        return
    setting = crashing_setting()
    if setting is not None:
        raise EnvironmentFault(fault, setting, f"unset it, or torch crashes; {_GET_NVML}")
    on_event(Notice(f"{fault}: more memory than is used may be reserved; {_GET_NVML}", "warning"))


def crashing_setting() -> str | None:
    """The environment variable with which torch would crash at the first tensor on a GPU."""
    asking = [name for name in _ALLOCATOR_SETTINGS if "expandable_segments:True" in os.environ.get(name, "")]
    return asking[0] if asking and growth_fault() is not None else None


def growth_fault() -> str | None:
    """Why the segments of torch's allocator cannot grow; None: they can. torch 2.11 did without NVML, 2.14 crashes."""
    if torch.version.cuda is None or not at_least(torch.__version__, "2.12") or nvml() is not None:
        return None
    return f"torch {torch.__version__} needs NVML for expandable segments, and libnvidia-ml.so.1 cannot be used"


@functools.cache
def capability_of(device: torch.device) -> Capability | None:
    """The CUDA compute capability of this device (not of the first one); None of a CPU."""
    if device.type != "cuda":
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.cuda.get_device_capability(device)
    except RuntimeError as fault:
        raise EnvironmentFault(f"CUDA does not start: {str(fault).splitlines()[0]}", device, "use cpu") from fault


def lacks_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU without bf16; torch would emulate it there, slowly."""
    capability = capability_of(device)
    return capability is not None and capability < OLDEST_WITH_BF16


def gpu_facts(device: torch.device) -> dict[str, str | None] | None:
    """Name, compute capability, driver and CUDA of a GPU, for the records of a run; None of a CPU.

    ``driver`` is its release, null where NVML is absent; ``cuda_driver`` the newest CUDA that it supports; ``cuda`` the
    one that torch is built for.
    """
    capability = capability_of(device)
    if capability is None:
        return None
    newest = driver_version()
    return {
        "name": torch.cuda.get_device_name(device),
        "capability": "{}.{}".format(*capability),
        "driver": driver_release(),
        "cuda_driver": None if newest is None else "{}.{}".format(*newest),
        "cuda": torch.version.cuda,
    }


def cpu_facts() -> dict[str, str | int]:
    """Model name of the processor, cores that this process may use, and torch's threads, for the records of a run."""
    return {"name": processor_name(), "cores": core_count(), "threads": torch.get_num_threads()}


def driver_release() -> str | None:
    """As nvidia-smi shows it; None without NVML."""
    library = nvml()
    return None if library is None else library.driver()


def gpus_of_driver() -> list[tuple[str, Capability]]:
    """Name and compute capability of each GPU that the driver knows, also where torch finds none; without NVML none."""
    library = nvml()
    return [] if library is None else library.gpus()


def nvml_gpu(device: torch.device) -> NvmlGpu | None:
    """The device as NVML knows it; None of a CPU, and where NVML is absent or does not know it."""
    library = nvml() if device.type == "cuda" else None
    uuid = None if library is None else getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if library is None or uuid is None else library.gpu(str(uuid))


def memory_size_bytes(device: torch.device) -> int:
    """How much memory the device has; for the CPU, that of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory_bytes(device: torch.device) -> int:
    """Free memory of the device; for the CPU, what the machine and its control groups leave to this process."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_host_bytes()


def free_gpu_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU that may be in use or unsupported: by NVML, else by starting CUDA on it; None: unknown."""
    known = nvml_gpu(device)
    free = None if known is None else known.free_bytes()
    if free is None:
        with contextlib.suppress(RuntimeError):
            free = free_memory_bytes(device)
    return free


def gpu_count() -> int:
    """How many GPUs torch finds, those included that it has no kernels for.

    Torch's warnings about CUDA take several lines; the errors raised here say the same in one.
    """
    with warnings.catch_warnings(action="ignore"):
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cuda_fault() -> str | None:
    """Why a torch that is built for CUDA finds no GPU; None: it finds one, or is built without CUDA."""
    if torch.version.cuda is None or gpu_count():
        return None
    driver = driver_version()
    if driver is not None and driver[0] < int(torch.version.cuda.split(".")[0]):
        return f"the driver knows CUDA only up to {driver[0]}.{driver[1]}; {build_for_driver(driver)}"
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as fault:
        return str(fault).splitlines()[0].split(". ")[0].rstrip(".")
    return "no GPU is visible"


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA version that the GPU driver supports, as (12, 4); None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) or not version.value:
        return None
    return version.value // 1000, version.value % 1000 // 10
