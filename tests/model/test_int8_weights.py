"""Int8 weights: codes and scales against a slow reading, and products against those of the same numbers in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llamatune.model import int8, int8_casts
from llamatune.model.int8 import Int8Weight
from llamatune.model.int8_casts import casts_codes, product_with_codes
from llamatune.model.packed_weight import Scratch
from llamatune.shapes import int8_products
from llamatune.shapes.int8_products import rows_cast_by_onednn
from llamatune.shapes.tile_sizes import WEIGHTS_AT_ONCE

SHAPES = [(64, 64), (37, 53), (1, 1), (3, 5), (1, 200), (130, 129), (48, 112)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


def matrix(shape: tuple[int, ...], std: float = 0.02, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def held(weight: Int8Weight) -> Tensor:
    return weight.codes.double() * weight.scales.double()[:, None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPES
def test_a_weight_comes_back_within_half_a_step(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = matrix(shape).to(dtype)
    W[0] *= 30
    weight = Int8Weight.quantize(W, Scratch())
    largest, scales = W.double().abs().amax(1), weight.scales.double()
    assert bool((scales * 127 >= largest * (1 - 1e-6)).all())
    assert bool((scales * 127 <= largest * (1 + 2**-7)).all()), "no larger than the next bf16"
    assert bool((weight.codes.abs().amax(1) >= 126).all())
    assert bool(((held(weight) - W.double()).abs() <= scales[:, None] * (0.5 + 1e-4)).all())
    assert torch.equal(weight.unpacked(torch.float32).double(), held(weight))


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0, 1e-44, 3e38, -448.0])
def test_constant_rows_and_rows_of_zeros_come_back(value: float) -> None:
    W = torch.full((5, 70), value)
    W[2] = 0.0
    found = Int8Weight.quantize(W, Scratch()).unpacked(torch.float32)
    torch.testing.assert_close(found, W, rtol=1 / 252, atol=2.0**-126)
    assert not found[2].any()


@DTYPES
def test_unpacking_is_the_same_in_pieces_and_rounds_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Int8Weight.quantize(matrix((200, 130)), Scratch())
    whole = weight.unpacked(dtype).clone()
    assert torch.equal(whole, held(weight).float().to(dtype))
    monkeypatch.setitem(WEIGHTS_AT_ONCE, "cpu", 256)
    again = Int8Weight.quantize(matrix((200, 130)), Scratch())
    assert torch.equal(again.unpacked(dtype), whole)
    assert sum(buffer.nbytes for buffer in again.buffers()) == 200 * 130 + 2 * 200


@pytest.mark.parametrize("shape", [(64, 32), (37, 96), (7, 53), (16, 176), (5, 1)], ids=str)
@pytest.mark.parametrize("leading", [(1,), (8,), (9,), (1, 1), (2, 4), (2, 9), (0,), (1, 0)], ids=str)
@DTYPES
@pytest.mark.parametrize("generates", [False, True])
def test_products_are_those_of_the_held_numbers(
    shape: tuple[int, int], leading: tuple[int, ...], dtype: torch.dtype, generates: bool
) -> None:
    """Few rows and many, whole vectors of columns and others, whichever way they are computed."""
    weight = Int8Weight.quantize(matrix(shape) * torch.logspace(-2, 2, shape[0])[:, None], Scratch())
    x, grad = matrix((*leading, shape[1]), 2.0, 1).to(dtype), matrix((*leading, shape[0]), 1.0, 2).to(dtype)
    eps = torch.finfo(dtype).eps
    bound = (x.double().abs() @ held(weight).abs().T) * eps * 8 + 1e-9
    with torch.inference_mode(generates):
        found = weight.product(x)
    assert (found.shape, found.dtype) == ((*leading, shape[0]), dtype)
    assert bool(((found.double() - x.double() @ held(weight).T).abs() <= bound).all())
    back = weight.product_back(grad)
    assert (back.shape, back.dtype) == ((*leading, shape[1]), dtype)
    bound = (grad.double().abs() @ held(weight).abs()) * eps * 8 + 1e-9
    assert bool(((back.double() - grad.double() @ held(weight)).abs() <= bound).all())


@pytest.mark.parametrize("rows", [3, 20])
def test_a_product_is_added_and_written_where_it_is_asked_for(rows: int) -> None:
    weight = Int8Weight.quantize(matrix((48, 64)), Scratch())
    x, added, out = matrix((rows, 64), 2.0).bfloat16(), matrix((rows, 48), 1.0, 5).bfloat16(), torch.empty(rows, 48)
    expected, kept = weight.product(x).double() + added.double(), added.clone()
    found = weight.product(x, room := out.bfloat16(), added)
    assert found.data_ptr() == room.data_ptr()
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)
    assert torch.equal(added, kept)
    across = x.t().contiguous().t()  # rows that are not contiguous
    assert torch.equal(weight.product(across), weight.product(x))


def test_the_kernel_is_for_few_rows_of_bf16_in_whole_vectors() -> None:
    weight, odd = (Int8Weight.quantize(matrix((16, columns)), Scratch()) for columns in (64, 80))
    few, many = torch.zeros(8, 64, dtype=torch.bfloat16), torch.zeros(9, 64, dtype=torch.bfloat16)
    assert weight.multiplies_codes(few)
    assert not any(weight.multiplies_codes(x) for x in (many, few.float(), few.half(), few[:0], few.to("meta")))
    assert not odd.multiplies_codes(torch.zeros(1, 80, dtype=torch.bfloat16))


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="digits are for processors with VNNI")
@pytest.mark.parametrize("shape", [(1024, 1024), (1031, 1019), (64, 28672)], ids=str)
@pytest.mark.parametrize("rows", [9, 33, 64])
def test_products_by_two_digits_are_those_of_the_held_numbers(shape: tuple[int, int], rows: int) -> None:
    """Of rows with outliers, of zeros, and of tiny and huge numbers; and each row is the same in other company."""
    weight = Int8Weight.quantize(matrix(shape) * torch.logspace(-2, 2, shape[0])[:, None], Scratch())
    x = matrix((rows, shape[1]), 2.0, 1)
    x[0, 3] *= 300
    x[1] = 0
    x[2] *= 1e-30
    x[3] *= 1e30
    x = x.bfloat16()
    with torch.inference_mode():
        assert weight.multiplies_digits(x)
        found = weight.product(x)
        assert found.is_contiguous(), "attention's kernel wants rows"
        assert torch.equal(weight.product(x[:9]), found[:9])
        x[4, 7] = torch.nan
        assert bool(weight.product(x)[4].isnan().all())
        x[4, 7] = torch.inf
        assert not bool(weight.product(x)[4].isfinite().any())
    assert not weight.multiplies_digits(x)
    x[4, 7] = 0
    exact = x.double() @ held(weight).T
    of_digits = x.double().abs().amax(1, keepdim=True) / (127 * 128) * held(weight).abs().sum(1)
    error = (found.double() - exact).abs()[:4]
    assert bool((error <= (exact.abs() * 2**-8 + of_digits / 2 + 1e-36)[:4]).all())


@pytest.mark.parametrize("rows", [1, 5, 9, 64, 65, 128, 129, 256, 257])
def test_a_product_in_any_layout_has_the_numbers_of_one_in_rows(rows: int, amx: bool) -> None:
    """By the kernel, by digits, and by cast codes as the left factor and as the right one."""
    weight = Int8Weight.quantize(matrix((1040, 1024)), Scratch())
    x = matrix((1, rows, 1024), 1.0, seed=2).bfloat16()
    exact = x.double() @ held(weight).T
    with torch.inference_mode():
        in_rows = weight(x)
        weight.any_layout = True
        found = weight(x)
    assert in_rows.is_contiguous()
    in_columns = 8 < rows <= (256 if amx else 64 if torch.cpu._is_vnni_supported() else 0)
    assert found.is_contiguous() != in_columns
    assert found.mT.is_contiguous() == (rows == 1 or in_columns)
    for y in (in_rows, found):
        assert (y.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
    if rows <= 128:
        assert torch.equal(found, in_rows)


def test_too_many_codes_are_not_cast_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch, with a small matrix."""
    weight, x = Int8Weight.quantize(matrix((64, 128)), Scratch()), matrix((65, 128), 1.0, 3).bfloat16()
    with torch.inference_mode():
        for most, cast in ((64 * 128, True), (64 * 128 - 1, False)):
            monkeypatch.setattr(int8, "CAST_AT_ONCE", most)
            assert weight.multiplies_joined(x) == cast
            assert weight.multiplies_joined(x[:8])


def test_joined_matrices_take_the_way_of_each_of_them() -> None:
    """A small matrix is not multiplied by digits because it is joined with a large one: the bits are the same."""
    for heights, joins in (((1024, 256), False), ((1024, 1024), True)):
        whole = matrix((sum(heights), 1024))
        codes = Int8Weight.quantize(whole, Scratch())
        rows = torch.split(codes.codes, heights)
        scales = torch.split(codes.scales, heights)
        parts = [
            Int8Weight((height, 1024), {"codes": own, "scales": scale}, codes.scratch)
            for height, own, scale in zip(heights, rows, scales, strict=True)
        ]
        joined = Int8Weight.joined(parts)
        assert joined is not None
        for count, quicker in ((1, True), (8, True), (20, joins and torch.cpu._is_vnni_supported()), (65, True)):
            x = matrix((count, 1024), 1.0, 3).bfloat16()
            assert joined.multiplies_joined(x) == (count <= 8), "the bits of training do not depend on it"
            with torch.inference_mode():
                assert joined.multiplies_joined(x) == quicker
                assert not joined.multiplies_joined(x.float())
                assert not joined.multiplies_joined(x.half())
                apart, found = torch.cat([part.product(x) for part in parts], dim=1), joined.product(x)
                if quicker and count <= 64:
                    assert torch.equal(found, apart)
                torch.testing.assert_close(found, apart, rtol=2**-6, atol=2**-6 * apart.abs().max().item())


def test_a_machine_with_bf16_in_onednn_and_no_amx_has_codes_cast_by_onednn(amx: bool) -> None:
    """What torch's documentation does not say may change; then this fails, and products are those by torch."""
    assert casts_codes() == (torch.ops.mkldnn._is_mkldnn_bf16_supported() and not amx)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 on this processor")
@pytest.mark.parametrize("shape", [(37, 53), (130, 64), (1024, 1024), (1, 8), (515, 4099)], ids=str)
@pytest.mark.parametrize("rows", [1, 9, 65, 200])
def test_products_with_codes_that_onednn_casts_are_rounded_and_scaled(
    shape: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once and in parts, the last of which has fewer rows, of x in rows and in columns."""
    weight = Int8Weight.quantize(matrix(shape) * torch.logspace(-2, 2, shape[0])[:, None], Scratch())
    x = matrix((rows, shape[1]), 2.0, 1).bfloat16()
    exact = (x.double() @ weight.codes.double().T) * weight.scales.double()
    bound = (x.double().abs() @ held(weight).abs().T) * 2**-7 + 1e-9
    with torch.inference_mode():
        whole = product_with_codes(x, weight.codes, weight.scales)
        assert torch.equal(product_with_codes(x.T.contiguous().T, weight.codes, weight.scales), whole)
        monkeypatch.setattr(int8_products, "_CAST_BY_ONEDNN", 64 * shape[1])
        assert rows_cast_by_onednn(shape[1]) == 64
        in_parts = product_with_codes(x, weight.codes, weight.scales)
    assert (whole.shape, whole.dtype, whole.is_contiguous()) == ((rows, shape[0]), x.dtype, True)
    for found in (whole, in_parts):
        assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 on this processor")
def test_codes_are_cast_in_products_of_large_matrices_in_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in training, in another dtype, of few rows or of a small matrix; joined matrices are one product."""
    monkeypatch.setattr(int8, "casts_codes", lambda: True)
    whole = Int8Weight.quantize(matrix((2048, 1024)), Scratch())
    small = Int8Weight.quantize(matrix((1023, 1024)), Scratch())
    x = matrix((70, 1024), 1.0, 3).bfloat16()
    assert not whole.casts_in_product(x)
    with torch.inference_mode():
        assert whole.casts_in_product(x)
        assert not any(whole.casts_in_product(other) for other in (x.float(), x.half(), x[:64], x.to("meta")))
        assert not small.casts_in_product(x)
        monkeypatch.setattr(int8, "product_with_codes", lambda x, codes, scales: x.new_full((len(x), len(codes)), 7))
        assert bool((whole.product(x) == 7).all())
        assert bool((whole.product(x, added=torch.ones(70, 2048).bfloat16()) == 8).all())
        assert bool((whole.product(x[:64]) != 7).any())
        assert not bool((small.product(x) == 7).any())
        monkeypatch.setattr(int8, "CAST_AT_ONCE", 0)
        assert whole.multiplies_joined(x)
        assert not small.multiplies_joined(x)


def _refuses(x: Tensor, W: Tensor) -> Tensor:
    raise RuntimeError("could not create a primitive descriptor")


def _errs(x: Tensor, W: Tensor) -> Tensor:
    return torch.zeros(len(x), len(W), dtype=torch.bfloat16).to_mkldnn()


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bf16 on this processor")
@pytest.mark.parametrize("linear", [_refuses, _errs])
def test_a_onednn_that_refuses_or_errs_is_not_used(
    linear: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert int8_casts._is_possible.__wrapped__()
    monkeypatch.setattr(int8_casts.F, "linear", linear)
    assert not int8_casts._is_possible.__wrapped__()
