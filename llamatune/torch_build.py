"""Which GPUs this build of torch supports: CUDA driver, compute capabilities, compiled kernels."""

from __future__ import annotations

import ctypes
import re
import warnings
from collections.abc import Sequence

import torch

from llamatune.errors import EnvironmentFault
from llamatune.shapes.attention_kernels import Capability

_CUDA_12_BUILD = (
    "install torch 2.10 to 2.14 built for CUDA 12.6 (https://pytorch.org/get-started/previous-versions has the command)"
)
"""The last builds that hold kernels for compute capabilities 5.0 to 7.0."""


def torch_silenced() -> warnings.catch_warnings[None]:
    """Without torch's warnings about CUDA: they take several lines, and the error raised here says the same in one."""
    return warnings.catch_warnings(action="ignore")


def gpu_count() -> int:
    """How many GPUs torch finds, those included that it has no kernels for."""
    with torch_silenced():
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def cuda_fault() -> str | None:
    """Why a torch that is built for CUDA finds no GPU; None: it finds one, or is built without CUDA."""
    if torch.version.cuda is None or gpu_count():
        return None
    driver = driver_version()
    if driver is not None and driver[0] < int(torch.version.cuda.split(".")[0]):
        older_build = _CUDA_12_BUILD if driver[0] == 12 else "install a build of torch for its CUDA"
        return f"the driver knows CUDA only up to {driver[0]}.{driver[1]}; update it, or {older_build}"
    try:
        with torch_silenced():
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


def has_kernels(capability: Capability, architectures: Sequence[str]) -> bool:
    """Whether a build for these ``architectures`` (as in ``torch.cuda.get_arch_list``) runs on such a GPU.

    ``sm_86`` is machine code: for 8.6 and later ones of 8. ``compute_86`` is compiled by the driver: for 8.6 and all
    later ones. With an ``a`` either is for that one alone, with an ``f`` for its major version.
    """
    matches = (re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in architectures)
    known = [match.groups() for match in matches if match]
    return not known or any(_covers(capability, *groups) for groups in known)


def _covers(capability: Capability, kind: str, major: str, minor: str, only: str) -> bool:
    built = (int(major), int(minor))
    if only == "a":
        return capability == built
    return capability >= built and (capability[0] == built[0] or (kind == "compute" and not only))


def refuse_unsupported(device: torch.device, capability: Capability) -> None:
    """Raise ``EnvironmentFault`` if this build of torch has no kernels for the GPU."""
    architectures = torch.cuda.get_arch_list()
    if not has_kernels(capability, architectures):
        gpu = f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}"
        built = f"torch {torch.__version__} has no kernels for it, only for {', '.join(architectures)}"
        todo = f"{build_for(capability)}, or use the device cpu (in the environment: CUDA_VISIBLE_DEVICES=)"
        raise EnvironmentFault(f"{gpu}; {built}", device, todo)


def build_for(capability: Capability) -> str:
    """What to install for a GPU that the installed build does not support."""
    if capability >= (7, 5):  # the oldest that builds for CUDA 13 have kernels for
        return "install a build of torch for a newer CUDA (https://pytorch.org/get-started/locally)"
    return _CUDA_12_BUILD if capability >= (5, 0) else "use a newer GPU"
