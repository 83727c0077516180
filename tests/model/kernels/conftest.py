"""Kernels for the tests of this folder: on a GPU, or on the CPU by Triton's interpreter."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be interpreted")

import triton.language as tl
from kernel_judges import DEVICE
from triton.runtime import interpreter

from llamatune.model.kernels.choice import running_kernels


@pytest.fixture(autouse=True)
def interpreted_kernels() -> Iterator[None]:
    """Kernels in place of plain functions, and tensors where they run."""
    with running_kernels(DEVICE), torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def bf16_to_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round fp32 to bf16 as a GPU does: the interpreter (3.9) cuts the lower bits off."""
    convert = interpreter._convert_float

    def rounded(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.uint16).numpy().reshape(x.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
