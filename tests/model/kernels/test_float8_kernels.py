"""The kernels of float8 against the plain functions, to the bit."""

import math

import pytest
import torch
from kernel_judges import DTYPES, ODD_ROWS

from llamatune.model import float8
from llamatune.model.float8 import Float8Weight, quantize_rows, transpose_bytes
from llamatune.model.kernels.choice import running_kernels
from llamatune.model.packed_weight import Scratch


@DTYPES
@ODD_ROWS
@pytest.mark.parametrize("width", [1, 48, 1367])
@pytest.mark.parametrize("folds", [False, True])
def test_rows_are_quantised_as_by_the_plain_function(rows: int, width: int, folds: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(rows, 2 * width) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)[:, :width]  # not contiguous
    x[rows // 2] = 0.0
    factors = 2.0 ** torch.randint(-9, 3, (width,)) if folds else None
    with torch.no_grad():
        found = quantize_rows(x, factors)
        with running_kernels(None):
            wide = x.float() if dtype == torch.float16 else x  # whose small numbers lose bits by folding
            expected = quantize_rows(wide, factors)
        turned = quantize_rows(x.t().contiguous().t(), factors)
    for mine, other, plain in zip(found, turned, expected, strict=True):
        assert (mine.dtype, mine.shape) == (plain.dtype, plain.shape)
        assert torch.equal(mine.float(), plain.float())
        assert torch.equal(other.float(), plain.float())


def test_each_quotient_is_rounded_as_torch_rounds_it() -> None:
    """Every number that e4m3 holds, what lies halfway between two, and the fp32 numbers beside these."""
    held = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halfway = (held[1:] + held[:-1]) / 2
    tried = torch.cat([held, *(torch.nextafter(halfway, torch.tensor(end)) for end in (-1.0, 1e3)), halfway])
    x = torch.cat([tried, -tried])[None]  # the largest is 448, so that the scale is 1
    with torch.no_grad():
        codes, scales = quantize_rows(x)
    assert scales.item() == 1
    assert torch.equal(codes.float(), x.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_leaves_nan_in_its_row(value: float) -> None:
    x = torch.randn(3, 40)
    x[1, 7] = value
    with torch.no_grad():
        codes, _ = quantize_rows(x)
    assert codes.float().isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (64, 64), (65, 129)], ids=str)
def test_bytes_are_transposed(shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    out = torch.zeros(shape[::-1], dtype=torch.uint8)
    with torch.no_grad():
        transpose_bytes(codes, out)
    assert torch.equal(out, codes.t())


def test_products_have_the_bits_of_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "capability_of", lambda _: (9, 0))
    W = torch.randn(64, 112) * torch.logspace(-2, 2, 64)[:, None]
    x, grad = torch.randn(5, 112).bfloat16(), torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        weight = Float8Weight.quantize(W, Scratch())
        found = weight.product(x), weight.product_back(grad)
        with running_kernels(None):
            plain = Float8Weight.quantize(W, Scratch())
            assert torch.equal(found[0], plain.product(x))
            assert torch.equal(found[1], plain.product_back(grad))
