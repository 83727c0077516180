"""The SwiGLU kernels against the plain functions in fp64."""

import torch
from kernel_judges import DTYPES, ODD_ROWS, assert_as_plain

from llamatune.model.fused.operations import swiglu_backward, swiglu_in_place
from llamatune.model.layers import swiglu

WIDTH = 1367  # more than a block, and no multiple of anything


@DTYPES
@ODD_ROWS
def test_forward(rows: int, dtype: torch.dtype) -> None:
    gate, up = (3 * torch.randn(rows, WIDTH)).to(dtype), torch.randn(rows, WIDTH).to(dtype)
    assert_as_plain(swiglu, gate, up)
    assert_as_plain(swiglu_in_place, gate, up)


@DTYPES
@ODD_ROWS
def test_backward(rows: int, dtype: torch.dtype) -> None:
    grad, gate, up = (3 * torch.randn(rows, WIDTH).to(dtype) for _ in range(3))
    assert_as_plain(swiglu_backward, grad, gate, up)
