"""Float8 weights and products against a slow reading of e4m3, and against products in fp64 of the same numbers."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from llamatune.model import float8
from llamatune.model.float8 import Float8Weight, quantize_rows
from llamatune.model.packed_weight import Scratch
from llamatune.shapes.float8_products import runs_in_float8
from llamatune.shapes.tile_sizes import WEIGHTS_AT_ONCE

SHAPES = [(64, 64), (37, 53), (1, 1), (3, 5), (1, 200), (130, 129), (48, 112)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


def number_of(code: int) -> float:
    """What a byte stands for: a sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinity (OCP, OFP8)."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


MAGNITUDES = [number_of(code) for code in range(127)]


def nearest(value: float) -> float:
    """The nearest e4m3; between two, the one with the even code."""
    code = min(range(127), key=lambda code: (abs(abs(value) - MAGNITUDES[code]), code & 1))
    return math.copysign(MAGNITUDES[code], value)


def least_power_of_two(largest: float) -> float:
    """Such that ``largest`` divided by it is at most 448."""
    exponent = -126
    while largest > 448 * 2.0**exponent:
        exponent += 1
    return 2.0**exponent


def matrix(shape: tuple[int, ...], std: float = 0.02, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


@pytest.fixture
def products_in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an H100, by the CPU's ``torch._scaled_mm``."""
    monkeypatch.setattr(float8, "capability_of", lambda _: (9, 0))


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# Weights.


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPES
def test_every_code_and_scale_is_that_of_the_slow_reading(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = matrix(shape).to(dtype)
    W[0] *= 30
    packed = Float8Weight.quantize(W, Scratch())
    for row, scale, codes in zip(
        W.tolist(), packed.scales.tolist(), packed.codes.view(torch.uint8).tolist(), strict=True
    ):
        assert scale == least_power_of_two(max(map(abs, row)))
        assert [number_of(code) for code in codes] == [nearest(value / scale) for value in row]


def test_each_of_the_256_codes_is_unpacked_to_its_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = Float8Weight((1, 256), {"codes": codes, "scales": torch.tensor([0.25])}, Scratch())
        found = weight.unpacked(dtype)[0].tolist()
        for code, number in enumerate(found):
            expected = 0.25 * number_of(code)
            assert number == expected or (math.isnan(number) and math.isnan(expected))


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-44, 3e38, -448.0])
def test_constant_rows_and_rows_of_zeros_come_back(value: float) -> None:
    W = torch.full((5, 70), value)
    W[2] = 0.0
    found = Float8Weight.quantize(W, Scratch()).unpacked(torch.float32)
    # What is less than the least normal fp32 is divided by that.
    torch.testing.assert_close(found, W, rtol=2**-4, atol=2.0**-136)
    assert not found[2].any()


def test_it_costs_a_byte_a_weight_and_a_scale_a_row() -> None:
    packed = Float8Weight.quantize(matrix((512, 1024)), Scratch())
    assert sum(buffer.nbytes for buffer in packed.buffers()) == 512 * 1024 + 4 * 512


def test_the_error_on_a_normal_matrix_is_that_of_three_bits() -> None:
    """A mantissa that is evenly spread within an octave is off by 1/(8 sqrt 12) of its power of two, 0.0260 in all."""
    octave = torch.linspace(1, 2, 100_001, dtype=torch.float64)
    expected = math.sqrt(float((((octave * 8).round() / 8 - octave) ** 2).sum() / (octave**2).sum()))
    W = matrix((1024, 1024))
    found = distance(Float8Weight.quantize(W, Scratch()).unpacked(torch.float32), W)
    assert found == pytest.approx(expected, rel=0.15)
    best = min(distance((W * scale).to(torch.float8_e4m3fn).float() / scale, W) for scale in (400.0, 900.0, 2000.0))
    assert found == pytest.approx(best, rel=0.02), "a scale between powers of two gains nothing"


def test_unpacking_is_the_same_in_pieces_and_exact_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Float8Weight.quantize(matrix((200, 130)), Scratch())
    whole = packed.unpacked(torch.float32).clone()
    assert torch.equal(whole, packed.codes.float() * packed.scales[:, None])
    assert torch.equal(packed.unpacked(torch.bfloat16).float(), whole)
    torch.testing.assert_close(packed.unpacked(torch.float16).float(), whole, rtol=0, atol=2**-25)
    monkeypatch.setitem(WEIGHTS_AT_ONCE, "cpu", 256)
    assert torch.equal(packed.unpacked(torch.float32), whole)
    assert torch.equal(Float8Weight.quantize(matrix((200, 130)), Scratch()).unpacked(torch.float32), whole)


# Rows that are quantised as they come.


@DTYPES
def test_rows_are_quantised_to_their_largest_magnitude(dtype: torch.dtype) -> None:
    x = (matrix((7, 33), std=3.0) * torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    x[4] = 0.0
    codes, scales = quantize_rows(x)
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.float32, (7, 1))
    for row, scale, found in zip(x.float(), scales[:, 0], codes.float(), strict=True):
        assert float(scale) == pytest.approx(float(row.abs().max()) / 448, rel=1e-6, abs=2.0**-126)
        assert found.tolist() == [nearest(quotient) for quotient in (row / scale).tolist()]
    assert codes[[0, 1, 2, 3, 5, 6]].float().abs().amax(1).eq(448).all()
    assert not codes[4].float().any()


def test_a_row_is_quantised_alike_whatever_is_beside_it() -> None:
    x = matrix((9, 48), std=2.0).bfloat16()
    x[3] *= 1000
    for row in range(9):
        alone = quantize_rows(x[row : row + 1])
        assert torch.equal(alone[0].float(), quantize_rows(x)[0][row : row + 1].float())
        assert torch.equal(alone[1], quantize_rows(x)[1][row : row + 1])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so_in_its_row_alone(value: float, products_in_float8: None) -> None:
    weight = Float8Weight.quantize(matrix((32, 48)), Scratch())
    x, grad = matrix((3, 48)).bfloat16(), matrix((3, 32)).bfloat16()
    x[1, 5] = grad[1, 5] = value
    for y in (weight.product(x), weight.product_back(grad)):
        assert y.isfinite().all(1).tolist() == [True, False, True]


# Products.


@pytest.mark.parametrize("shape", [(64, 48), (16, 112), (128, 128)], ids=str)
@pytest.mark.parametrize("leading", [(1,), (17,), (2, 9), (0,)], ids=str)
def test_products_are_those_of_the_rounded_factors(
    shape: tuple[int, int], leading: tuple[int, ...], products_in_float8: None
) -> None:
    W = matrix(shape) * torch.logspace(-2, 2, shape[0])[:, None]  # scales differ from row to row
    weight = Float8Weight.quantize(W, Scratch())
    held = weight.codes.double() * weight.scales.double()[:, None]
    x, grad = matrix((*leading, shape[1]), 2.0, 1).bfloat16(), matrix((*leading, shape[0]), 1e-4, 2).bfloat16()

    codes, scales = quantize_rows(x.view(-1, shape[1]))
    expected = (codes.double() * scales.double()) @ held.T
    found = weight.product(x)
    assert (found.shape, found.dtype) == ((*leading, shape[0]), torch.bfloat16)
    torch.testing.assert_close(found.view(-1, shape[0]).double(), expected, rtol=2**-8, atol=1e-5)

    codes, scales = quantize_rows((grad.double() * weight.scales.double()).view(-1, shape[0]).float())
    expected = (codes.double() * scales.double()) @ weight.codes.double()
    found = weight.product_back(grad)
    assert (found.shape, found.dtype) == ((*leading, shape[1]), torch.bfloat16)
    torch.testing.assert_close(found.view(-1, shape[1]).double(), expected, rtol=2**-8, atol=1e-9)

    if x.numel():
        assert 0 < distance(weight.product(x), x.double() @ held.T) < 0.05
        assert 0 < distance(weight.product_back(grad), grad.double() @ held) < 0.05


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((37, 48), torch.bfloat16), ((48, 37), torch.bfloat16), ((8, 32), torch.bfloat16), ((64, 48), torch.float32),
     ((64, 48), torch.float16)],
)  # fmt: skip
def test_others_are_those_of_the_unpacked_matrix(
    shape: tuple[int, int], dtype: torch.dtype, products_in_float8: None
) -> None:
    weight = Float8Weight.quantize(matrix(shape), Scratch())
    x, grad = matrix((2, 5, shape[1])).to(dtype), matrix((2, 5, shape[0])).to(dtype)
    W = weight.unpacked(dtype).clone()
    assert torch.equal(weight.product(x), x @ W.T)
    assert torch.equal(weight.product_back(grad), grad @ W)


CAPABILITIES = {
    None: False, (7, 0): False, (7, 5): False, (8, 0): False, (8, 6): False, (8, 9): True, (9, 0): True,
    (10, 0): True, (10, 3): True, (11, 0): False, (12, 0): True, (12, 1): True,
}  # fmt: skip
"""Where the row-wise kernels of torch 2.10 to 2.14 are: 8.0, 8.9, 9.0, 10.0 and 12.0 were tried with torch 2.14.1 for
CUDA 13, whose own checks accept or refuse the call before a kernel starts."""


@pytest.mark.parametrize(("capability", "runs"), CAPABILITIES.items(), ids=str)
def test_where_products_run_in_float8(capability: tuple[int, int] | None, runs: bool) -> None:
    for computed, (rows, columns) in product(
        ("bfloat16", "float16", "float32"), product((16, 48, 24, 4095, 4096), (16, 40, 4096))
    ):
        expected = runs and computed == "bfloat16" and rows % 16 == columns % 16 == 0
        assert runs_in_float8(capability, computed, (rows, columns)) is expected
