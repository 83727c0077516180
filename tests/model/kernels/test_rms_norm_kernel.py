"""The RMSNorm kernels against the plain functions in fp64."""

import pytest
import torch
from kernel_judges import DTYPES, ODD_ROWS, assert_as_plain

from llamatune.model.fused.operations import normalise, normalise_backward
from llamatune.model.layers import RMSNorm, rms_norm


def norm_of(width: int, dtype: torch.dtype) -> RMSNorm:
    norm = RMSNorm(width, 1e-5).to(dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    return norm


@DTYPES
@ODD_ROWS
@pytest.mark.parametrize("width", [48, 1000])
def test_rows_of_any_width(width: int, rows: int, dtype: torch.dtype) -> None:
    x, grad, norm = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype), norm_of(width, dtype)
    assert_as_plain(rms_norm, x, norm.weight.detach(), norm.eps)
    assert_as_plain(normalise_backward, grad, x, norm)
    assert_as_plain(normalise_backward, grad, x, norm, torch.randn(rows, width).to(dtype))


def test_gradient_in_the_place_of_another() -> None:
    x, grad, beside = torch.randn(3, 7, 96).bfloat16()
    norm = norm_of(96, torch.bfloat16)
    with torch.no_grad():
        wanted = normalise_backward(grad, x, norm, beside)
        assert normalise_backward(grad, x, norm, beside, beside) is beside
    torch.testing.assert_close(beside, wanted, rtol=0, atol=0)


@DTYPES
def test_heads_side_by_side(dtype: torch.dtype) -> None:
    x, grad, norm = torch.randn(7, 96).to(dtype), torch.randn(7, 96).to(dtype), norm_of(12, dtype)
    assert_as_plain(rms_norm, x.view(-1, 12), norm.weight.detach(), norm.eps)
    assert_as_plain(normalise, x, norm, dtype)
    assert_as_plain(normalise_backward, grad, x, norm)


def test_fp32_residual_stream_to_16_bits() -> None:
    x, norm = 5 * torch.randn(7, 96), norm_of(96, torch.bfloat16)
    assert_as_plain(normalise, x, norm, torch.bfloat16)


def test_three_dimensions_and_rows_that_lie_apart() -> None:
    apart = torch.randn(2, 5, 96)[:, :, :64]
    assert_as_plain(rms_norm, apart, torch.rand(64), 1e-6)


def test_a_row_of_zeros() -> None:
    assert_as_plain(rms_norm, torch.zeros(2, 64), torch.ones(64), 1e-5)
