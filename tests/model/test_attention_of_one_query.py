"""Attention of one query for each head, as in a step of decoding, against the closed form in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llamatune.model import attention, attention_of_one_query
from llamatune.model.attention import added, attend
from llamatune.shapes import attention_kernels

ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def in_fp64(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(E) + mask) v."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.double() @ k.transpose(2, 3) / q.shape[3] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def drawn(
    rows: int, keys: int, heads: tuple[int, int], size: int, dtype: torch.dtype, ragged: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k and v as a cache with more room gives them, and which keys each row sees."""
    q = torch.randn(rows, heads[0], 1, size, dtype=dtype)
    stored = torch.randn(2, rows + 2, heads[1], keys + 3, size, dtype=dtype)
    k, v = stored[:, :rows, :, :keys]
    if not ragged:
        return q, k, v, None
    lengths = torch.randint(1, keys + 1, (rows, 1))
    return q, k, v, (torch.arange(keys) < lengths)[:, None, None]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    keys=st.integers(2, 70),
    heads=st.sampled_from([(1, 1), (6, 6), (6, 3), (7, 1), (12, 3)]),
    size=st.sampled_from([8, 20, 64]),
    dtype=st.sampled_from(list(ERRORS)),
    ragged=st.booleans(),
    at_once=st.sampled_from([1, 300, 2000, 1 << 18]),
    by_products=st.booleans(),
    amx=st.booleans(),
)
def test_is_the_closed_form_in_any_dtype_and_in_parts_of_any_size(
    rows: int,
    keys: int,
    heads: tuple[int, int],
    size: int,
    dtype: torch.dtype,
    ragged: bool,
    at_once: int,
    by_products: bool,
    amx: bool,
) -> None:
    q, k, v, seen = drawn(rows, keys, heads, size, dtype, ragged)
    mask = None if seen is None else added(seen, dtype)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(attention, "has_amx", lambda: amx)
        patch.setattr(attention_of_one_query, "WIDENED_AT_ONCE", at_once)
        patch.setattr(attention_kernels, "LEAST_BY_PRODUCTS", 1 if by_products else 1 << 30)
        found = attend(q, k, v, mask, None)
    expected = in_fp64(q, k, v, seen)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= ERRORS[dtype] * v.double().abs().max()


def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, tuple[int, ...], int]]:
    """The dtype, the shape of q and the numbers of k of every call of torch's attention from now on."""
    found: list[tuple[torch.dtype, tuple[int, ...], int]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def seen(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> Tensor:
        found.append((q.dtype, tuple(q.shape), k.numel()))
        return real(q, k, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    return found


@pytest.mark.parametrize(
    ("dtype", "heads", "amx", "used", "shape"),
    [
        (torch.bfloat16, (6, 6), False, torch.bfloat16, (2, 6, 2, 16)),  # each query twice
        (torch.bfloat16, (6, 3), False, torch.bfloat16, (2, 3, 2, 16)),
        (torch.float16, (6, 3), False, torch.float32, (2, 3, 2, 16)),
        (torch.float32, (6, 3), False, torch.float32, (2, 3, 2, 16)),
        (torch.bfloat16, (6, 6), True, torch.bfloat16, (2, 6, 1, 16)),
        (torch.bfloat16, (6, 3), True, torch.bfloat16, (2, 6, 1, 16)),  # heads of keys are repeated by the kernel
        (torch.bfloat16, (8, 2), True, torch.bfloat16, (2, 2, 4, 16)),
    ],
)
def test_the_kernel_is_the_one_that_was_fastest(
    dtype: torch.dtype,
    heads: tuple[int, int],
    amx: bool,
    used: torch.dtype,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = calls(monkeypatch)
    monkeypatch.setattr(attention, "has_amx", lambda: amx)
    q, k, v, _ = drawn(2, 9, heads, 16, dtype, ragged=False)
    with torch.inference_mode():
        attend(q, k, v, None, None)
    assert [(kind, of_q) for kind, of_q, _ in found] == [(used, shape)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_only_generation_computes_it_otherwise_than_torchs_kernel(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = calls(monkeypatch)
    monkeypatch.setattr(attention, "has_amx", lambda: False)
    monkeypatch.setattr(attention_kernels, "LEAST_BY_PRODUCTS", 1)
    q, k, v, _ = drawn(2, 9, (6, 6), 16, dtype, ragged=False)
    with torch.no_grad():  # as samples while a model trains are computed
        attend(q, k, v, None, None)
    assert [(kind, of_q) for kind, of_q, _ in found] == [(dtype, (2, 6, 1, 16))]


@pytest.mark.parametrize("amx", [False, True])
def test_many_keys_in_fp32_are_multiplied_without_the_kernel(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = calls(monkeypatch)
    monkeypatch.setattr(attention, "has_amx", lambda: amx)
    q, k, v, seen = drawn(9, 500, (4, 4), 16, torch.float32, ragged=True)  # 288,000 numbers
    assert seen is not None
    with torch.inference_mode():
        o = attend(q, k, v, added(seen, torch.float32), None)
    assert bool(found) == amx
    torch.testing.assert_close(o.double(), in_fp64(q, k, v, seen), atol=1e-5, rtol=0)


def test_a_row_by_products_is_as_alone_without_what_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_amx", lambda: False)
    monkeypatch.setattr(attention_kernels, "LEAST_BY_PRODUCTS", 1)
    q, k, v, seen = drawn(7, 300, (6, 3), 48, torch.float32, ragged=True)
    assert seen is not None
    with torch.inference_mode():
        together = attend(q, k, v, added(seen, torch.float32), None)
        for row, length in enumerate(seen.sum(-1).flatten().tolist()):
            one = slice(row, row + 1)
            alone = attend(q[one], k[one, :, :length], v[one, :, :length], None, None)
            torch.testing.assert_close(alone, together[one], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("rows", "keys", "heads"), [(5, 40, 6), (2, 400, 6), (1, 1000, 3)])
def test_no_more_is_widened_at_once_than_is_allowed(
    rows: int, keys: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = calls(monkeypatch)
    monkeypatch.setattr(attention, "has_amx", lambda: False)
    monkeypatch.setattr(attention_of_one_query, "WIDENED_AT_ONCE", 1 << 14)
    q, k, v, _ = drawn(rows, keys, (heads, heads), 16, torch.float16, ragged=False)
    with torch.inference_mode():
        attend(q, k, v, None, None)
    assert len(found) > 1
    assert max(numbers for _, _, numbers in found) <= 1 << 14
    assert sum(numbers for _, _, numbers in found) == k.numel()
