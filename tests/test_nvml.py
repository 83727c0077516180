"""The reader of NVML against a library that is compiled here, with the C functions and structures of the real one."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llamatune import devices
from llamatune.devices import gpu_facts, nvml_gpu
from llamatune.nvml import Nvml, open_nvml

UUID = "5e5b0ab5-0c6a-9e0f-4b6a-0123456789ab"

_SOURCE = r"""
#include <string.h>
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned long long total, free, used; } memory_v1;
static int started, gpu, instance;
#ifdef NO_DRIVER
int nvmlInit_v2(void) { return 9; }
#else
int nvmlInit_v2(void) { started = 1; return 0; }
#endif
int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    if (!started || length < 81) return 2;
    strcpy(text, "580.65.06");
    return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    if (!strcmp(uuid, "GPU-5e5b0ab5-0c6a-9e0f-4b6a-0123456789ab")) { *handle = &gpu; return 0; }
    if (!strcmp(uuid, "MIG-11111111-2222-3333-4444-555555555555")) { *handle = &instance; return 0; }
    return 6;
}
int nvmlDeviceGetMemoryInfo(void *device, memory_v1 *memory) {
    if (device != &gpu && device != &instance) return 2;
    memory->total = 80ull << 30; memory->used = 6ull << 30; memory->free = 74ull << 30;
    return 0;
}
#ifndef OLD
int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2 *memory) {
    if (memory->version != (sizeof(memory_v2) | 2u << 24)) return 25;
    memory->total = 80ull << 30; memory->reserved = 1ull << 30; memory->used = 5ull << 30; memory->free = 74ull << 30;
    return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    if (device != &gpu) return 3;
    *millijoules = 6000000000123ull;
    return 0;
}
#endif
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    if (index == 1) return 15;  /* a GPU that fell off the bus */
    *handle = index ? &instance : &gpu;
    return 0;
}
int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    if (length < 96) return 7;
    strcpy(name, device == &gpu ? "Tesla V100-SXM2-16GB" : "NVIDIA H100 80GB HBM3");
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    *major = device == &gpu ? 7 : 9;
    *minor = 0;
    return 0;
}
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) {
    if (device != &gpu) return 3;
    *milliwatts = 412345;
    return 0;
}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Nvml | None]:
    """The opened library, compiled with some definitions."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("nvml")
    (directory / "nvml.c").write_text(_SOURCE)

    def make(*definitions: str) -> Nvml | None:
        path = directory / f"nvml{'-'.join(definitions)}.so"
        defined = [f"-D{name}" for name in definitions]
        subprocess.run([compiler, "-shared", "-fPIC", *defined, "nvml.c", "-o", path], cwd=directory, check=True)
        return open_nvml(str(path))

    return make


def test_every_figure_is_read_in_its_unit(library: Callable[..., Nvml | None]) -> None:
    nvml = library()
    assert nvml is not None
    assert nvml.driver() == "580.65.06"
    gpu = nvml.gpu(UUID)
    assert gpu is not None
    assert gpu.used_bytes() == 5 << 30, "as nvidia-smi shows it, without what the driver reserves"
    assert gpu.power_w() == 412.345
    assert gpu.energy_j() == 6000000000.123, "more than 32 bits hold"
    assert nvml.gpu("00000000-0000-0000-0000-000000000000") is None


def test_every_gpu_of_the_machine_is_listed_that_answers(library: Callable[..., Nvml | None]) -> None:
    nvml = library()
    assert nvml is not None
    assert nvml.gpus() == [("Tesla V100-SXM2-16GB", (7, 0)), ("NVIDIA H100 80GB HBM3", (9, 0))]
    assert Nvml(SimpleNamespace()).gpus() == []


def test_an_old_driver_has_fewer_figures(library: Callable[..., Nvml | None]) -> None:
    nvml = library("OLD")
    gpu = nvml and nvml.gpu(UUID)
    assert gpu
    assert (gpu.used_bytes(), gpu.power_w(), gpu.energy_j()) == (6 << 30, 412.345, None)


def test_an_instance_of_a_divided_gpu_has_memory_and_no_power(library: Callable[..., Nvml | None]) -> None:
    nvml = library()
    gpu = nvml and nvml.gpu("11111111-2222-3333-4444-555555555555")
    assert gpu
    assert (gpu.used_bytes(), gpu.power_w(), gpu.energy_j()) == (5 << 30, None, None)


def test_without_library_or_driver_there_is_nothing(library: Callable[..., Nvml | None], tmp_path: Path) -> None:
    assert library("NO_DRIVER") is None
    assert open_nvml("libabsent-nvml.so.1") is None
    (tmp_path / "broken.so").write_bytes(b"no library")
    assert open_nvml(str(tmp_path / "broken.so")) is None
    assert Nvml(SimpleNamespace()).driver() is None
    assert Nvml(SimpleNamespace()).gpu(UUID) is None


def test_a_gpu_is_found_by_its_uuid_and_described(
    library: Callable[..., Nvml | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = library()
    monkeypatch.setattr(devices, "nvml", lambda: nvml)
    monkeypatch.setattr(devices, "driver_version", lambda: (13, 0))
    monkeypatch.setattr(devices, "capability_of", lambda device: None if device.type == "cpu" else (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    gpu = nvml_gpu(torch.device("cuda:3"))
    assert gpu is not None
    assert gpu.power_w() == 412.345
    facts = {"name": "NVIDIA H100", "capability": "9.0", "driver": "580.65.06", "cuda_driver": "13.0", "cuda": "12.8"}
    assert gpu_facts(torch.device("cuda:3")) == facts
    assert (nvml_gpu(torch.device("cpu")), gpu_facts(torch.device("cpu"))) == (None, None)
    monkeypatch.setattr(devices, "nvml", lambda: None)
    monkeypatch.setattr(devices, "driver_version", lambda: None)
    assert nvml_gpu(torch.device("cuda:3")) is None
    assert gpu_facts(torch.device("cuda:3")) == {**facts, "driver": None, "cuda_driver": None}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace())
    monkeypatch.setattr(devices, "nvml", lambda: nvml)
    assert nvml_gpu(torch.device("cuda:3")) is None, "an older torch tells no UUID"
