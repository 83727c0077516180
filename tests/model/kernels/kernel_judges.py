"""How close a kernel must come to its plain function, and the shapes and dtypes that are tried."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llamatune.model.kernels.choice import running_kernels

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels run: on a GPU compiled, on a CPU interpreted."""
ODD_ROWS = pytest.mark.parametrize("rows", [1, 3, 17])


def both(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What the kernel gives and what the plain function gives in fp64, each with the tensors written in place last."""

    def run(arguments: list[Any], device_type: str | None) -> list[Tensor]:
        with torch.no_grad(), running_kernels(device_type):
            given = function(*arguments)
        outputs = given if isinstance(given, tuple) else (given,)
        return [x for x in (*outputs, *arguments) if isinstance(x, Tensor)]

    def copied(x: Any, wide: bool) -> Any:
        if isinstance(x, nn.Module):
            return copy.deepcopy(x).double() if wide else x
        if x is torch.bfloat16 and wide:
            return torch.float64
        if not isinstance(x, Tensor):
            return x
        return x.double() if wide and x.is_floating_point() else x.clone()

    return run([copied(x, False) for x in arguments], DEVICE), run([copied(x, True) for x in arguments], None)


def assert_as_plain(function: Callable[..., Any], *arguments: Any) -> None:
    """A kernel is within one rounding of its dtype of the plain function in fp64, and of fp32's own errors."""
    for found, wanted in zip(*both(function, arguments), strict=True):
        assert found.shape == wanted.shape
        rounding = torch.finfo(found.dtype).eps if found.is_floating_point() else 0.0
        torch.testing.assert_close(found.double(), wanted.double(), rtol=max(rounding, 2e-6), atol=2e-6)
