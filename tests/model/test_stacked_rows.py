"""Rows that are multiplied together keep the bits that they have apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llamatune.model import stacked_rows
from llamatune.model.stacked_rows import StackedRows

SIZES = ((16, 16, 16, 16), (1, 7, 37, 64), (128, 90, 128, 3), (64, 64, 64, 64), (128, 128, 128, 128), (5, 11))


def apart(xs: list[Tensor], B: Tensor) -> list[Tensor]:
    return [torch.mm(x, B) for x in xs]


@pytest.mark.parametrize("shape", [(48, 100), (288, 768), (768, 288), (512, 1376), (1024, 1024), (2048, 768)])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_stack_has_the_bits_of_its_parts(shape: tuple[int, int], transposed: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(shape[::-1] if transposed else shape, generator=generator)
    B, stacked, together = (W.T if transposed else W), StackedRows(), 0
    for sizes in SIZES:
        for _ in range(2):
            xs = [torch.randn(rows, shape[0], generator=generator) for rows in sizes]
            outs = [None, *(torch.empty(rows, shape[1]) for rows in sizes[1:])]
            made = stacked.product(xs, B, outs)
            if made is not None:
                together += 1
                assert all(map(torch.equal, made, apart(xs, B)))
                assert all(out is None or out is y for y, out in zip(made, outs, strict=True))
    if transposed:
        assert together, "nothing was stacked, so nothing was shown"


def test_what_adds_in_another_order_is_not_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    mm = torch.mm

    def backwards(x: Tensor, B: Tensor) -> Tensor:
        return mm(x, B) if len(x) <= 64 else mm(x.flip(1), B.flip(0))

    monkeypatch.setattr(stacked_rows.torch, "mm", backwards)
    B, stacked = torch.randn(200, 90), StackedRows()
    few, many = ([torch.randn(rows, 200)] * 4 for rows in (16, 40))
    assert stacked.product(few, B, [None] * 4) is not None
    assert stacked.product(many, B, [None] * 4) is None


def test_what_is_no_plain_row_of_fp32_is_left_apart() -> None:
    B, stacked, x = torch.randn(64, 48), StackedRows(), torch.randn(8, 64)
    assert stacked.product([x, x], B, [None, None]) is not None
    assert stacked.product([x], B, [None]) is None
    odd = torch.randn(64, 8).T
    shifted = torch.randn(8 * 64 + 1)[1:].view(8, 64)
    for other in (x.bfloat16(), odd, shifted, torch.randn(129, 64), x.to("meta")):
        assert stacked.product([x, other], B, [None, None]) is None
    assert stacked.product([torch.randn(128, 64)] * 5, B, [None] * 5) is None
    assert stacked.product([x, x], B, [None, torch.empty(48, 8).T]) is None
