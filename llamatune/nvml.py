"""NVML, the library behind nvidia-smi, by ctypes: driver release; memory, power and energy of a GPU. No torch.

Whatever is missing (the library, a function of an older driver, a sensor of the GPU) is None, never an error.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_TEXT_BYTES = 96


class _MemoryOfDriver510(ctypes.Structure):
    """``nvmlMemory_v2_t``: ``used`` is what nvidia-smi shows; the driver's own part is ``reserved``."""

    _fields_ = [("version", ctypes.c_uint)] + [
        (name, ctypes.c_ulonglong) for name in ("total", "reserved", "free", "used")
    ]


class _Memory(ctypes.Structure):
    """``nvmlMemory_t``: ``used`` includes what the driver reserves."""

    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class NvmlGpu:
    """One GPU, or one instance of a GPU that is divided (MIG), which has memory of its own and no power."""

    def __init__(self, nvml: Nvml, handle: ctypes.c_void_p) -> None:
        self._nvml, self._handle = nvml, handle

    def used_bytes(self) -> int | None:
        """Memory of the whole device that is in use now, by every process."""
        memory = self._memory()
        return None if memory is None else int(memory.used)

    def free_bytes(self) -> int | None:
        """Memory that nobody uses now."""
        memory = self._memory()
        return None if memory is None else int(memory.free)

    def power_w(self) -> float | None:
        """What the board draws, in watts: at this moment, or over the last second, by the kind of GPU."""
        milliwatts = ctypes.c_uint()
        return milliwatts.value / 1000 if self._asked("nvmlDeviceGetPowerUsage", milliwatts) else None

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; from Volta on."""
        millijoules = ctypes.c_ulonglong()
        return millijoules.value / 1000 if self._asked("nvmlDeviceGetTotalEnergyConsumption", millijoules) else None

    def _memory(self) -> _MemoryOfDriver510 | _Memory | None:
        newer, older = _MemoryOfDriver510(version=ctypes.sizeof(_MemoryOfDriver510) | 2 << 24), _Memory()
        if self._asked("nvmlDeviceGetMemoryInfo_v2", newer):
            return newer
        return older if self._asked("nvmlDeviceGetMemoryInfo", older) else None

    def _asked(self, function: str, answer: Any) -> bool:
        return self._nvml.call(function, self._handle, ctypes.byref(answer))


class Nvml:
    """The loaded library."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, function: str, *arguments: Any) -> bool:
        """Whether the library has the function, and it succeeded."""
        called = getattr(self._library, function, None)
        return called is not None and called(*arguments) == 0

    def driver(self) -> str | None:
        """The driver's release, as ``580.65.06``."""
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        found = self.call("nvmlSystemGetDriverVersion", text, ctypes.c_uint(_TEXT_BYTES))
        return text.value.decode("ascii", "replace") or None if found else None

    def gpus(self) -> list[tuple[str, tuple[int, int]]]:
        """Name and compute capability of each GPU of the machine, also of those that CUDA does not see."""
        count, found = ctypes.c_uint(), []
        if not self.call("nvmlDeviceGetCount_v2", ctypes.byref(count)):
            return []
        for index in range(count.value):
            handle, name = ctypes.c_void_p(), ctypes.create_string_buffer(_TEXT_BYTES)
            major, minor = ctypes.c_int(), ctypes.c_int()
            is_known = (
                self.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
                and self.call("nvmlDeviceGetName", handle, name, ctypes.c_uint(_TEXT_BYTES))
                and self.call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
            )
            if is_known:
                found.append((name.value.decode("ascii", "replace"), (major.value, minor.value)))
        return found

    def gpu(self, uuid: str) -> NvmlGpu | None:
        """The GPU of this UUID as torch gives it: NVML counts GPUs otherwise than CUDA, which may not see all."""
        handle = ctypes.c_void_p()
        for kind in ("GPU", "MIG"):
            if self.call("nvmlDeviceGetHandleByUUID", f"{kind}-{uuid}".encode(), ctypes.byref(handle)):
                return NvmlGpu(self, handle)
        return None


def open_nvml(library: str = _LIBRARY) -> Nvml | None:
    """Load and start a library; None where there is none, or no driver."""
    try:
        nvml = Nvml(ctypes.CDLL(library))
    except OSError:
        return None
    return nvml if nvml.call("nvmlInit_v2") else None


nvml = functools.cache(open_nvml)
"""``open_nvml``, once a process."""
