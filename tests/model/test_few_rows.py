"""Products of few rows in bf16 on a CPU: equal to ``F.linear``, and used in generation only."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llamatune.model.layers import linear
from llamatune.model.products import few_rows_linear, suits_few_rows


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 7), (32, 1), (3,)])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_equal_the_product_in_float64(shape: tuple[int, ...], biased: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*shape, 96, generator=generator).bfloat16()
    W = torch.randn(40, 96, generator=generator).bfloat16()
    bias = torch.randn(40, generator=generator).bfloat16() if biased else None
    exact = F.linear(x.double(), W.double(), None if bias is None else bias.double())
    found = few_rows_linear(x, W, bias)
    assert found.shape == exact.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-4)


def test_only_generation_in_bf16_uses_it() -> None:
    x, W = torch.randn(1, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()
    assert not suits_few_rows(x, W)
    with torch.no_grad():  # activation checkpointing computes so
        assert not suits_few_rows(x, W)
    with torch.inference_mode():
        assert suits_few_rows(x, W)
        assert suits_few_rows(x.expand(8, 1024), W)
        assert torch.equal(linear(x, W), few_rows_linear(x, W))
        assert not suits_few_rows(x.expand(9, 1024), W)
        assert not suits_few_rows(x, W[:1023])
        assert not suits_few_rows(x.float(), W.float())
        assert not suits_few_rows(x.half(), W.half())
        with torch.autocast("cpu", torch.bfloat16):
            assert not suits_few_rows(x, W)
