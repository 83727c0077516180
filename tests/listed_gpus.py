"""GPUs as torch would list them: what is chosen, refused and said of them is tested without one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamatune import devices
from llamatune.nvml import Nvml

CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
Gpus = Callable[..., list[Any]]
V100, T4, H100 = ("Tesla V100-SXM2-16GB", (7, 0)), ("Tesla T4", (7, 5)), ("NVIDIA H100", (9, 0))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpus]:
    """GPUs of these names and capabilities under a torch with these kernels; gives the questions that CUDA was asked.

    With no GPU, ``fault`` is what torch says when CUDA starts.
    """
    asked: list[Any] = []
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(devices, "nvml", lambda: Nvml(SimpleNamespace()))
    devices.capability_of.cache_clear()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)

    def install(
        *found: tuple[str, tuple[int, int]], architectures: list[str] = CU130, cuda: str = "13.0", fault: str = ""
    ) -> list[Any]:
        def index_of(device: Any) -> int:
            asked.append((device, os.environ.get("PYTORCH_ALLOC_CONF")))
            return torch.device(device).index or 0

        def start() -> None:
            raise RuntimeError(fault)

        monkeypatch.setattr(torch.version, "cuda", cuda)
        replaced = {
            "is_available": lambda: bool(found),
            "device_count": lambda: len(found),
            "get_arch_list": lambda: architectures,
            "get_device_capability": lambda device=None: found[index_of(device)][1],
            "get_device_name": lambda device=None: found[index_of(device)][0],
            "get_device_properties": lambda device=None: SimpleNamespace(total_memory=16 << 30),
            "mem_get_info": lambda device=None: (15 << 30, 16 << 30),
            "init": start,
        }
        for name, function in replaced.items():
            monkeypatch.setattr(torch.cuda, name, function)
        return asked

    yield install
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    devices.capability_of.cache_clear()
