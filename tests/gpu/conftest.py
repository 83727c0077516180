"""The GPU of these tests. ``LLAMATUNE_GPU_TESTS_ON=cpu`` runs them on the CPU, to try the tests themselves."""

from __future__ import annotations

import os

import pytest
import torch

from llamatune.devices import choose_device


@pytest.fixture(scope="session")
def device() -> torch.device:
    wanted = os.environ.get("LLAMATUNE_GPU_TESTS_ON", "cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        pytest.skip("CUDA finds no GPU" if built else "this torch is built without CUDA")
    if wanted == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: equal bits are compared
    return choose_device(wanted)


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """For tests that say nothing on a CPU."""
    if device.type != "cuda":
        pytest.skip("LLAMATUNE_GPU_TESTS_ON=cpu: this needs a GPU")
    return device
