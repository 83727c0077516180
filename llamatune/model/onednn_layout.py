"""Int8 matrices in oneDNN's packed layout, which its kernel reads faster than rows: for generation in bf16 on a CPU.

They are multiplied by digits of x (``int8_digits``), so nothing is cast, of however many rows x is.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from llamatune.model.int8_digits import BASE, ZERO, unsigned_digits, unsigned_digits_of_one
from llamatune.processor import gains_by_onednn_layout
from llamatune.shapes.int8_products import DIGITS_TOGETHER, ROWS_OF_DIGITS, WIDE_DIGITS


@functools.cache
def has_onednn_layout() -> bool:
    """Whether codes can be held in it here: its products are exact, and the codes come back."""
    if not gains_by_onednn_layout():
        return False
    codes = torch.arange(67 * 70).mul_(37).remainder_(255).sub_(127).to(torch.int8).view(67, 70)
    digits = torch.arange(2 * 70).mul_(51).remainder_(256).to(torch.uint8).view(2, 70)
    try:
        matrix = OnednnMatrix(codes, torch.ones(67))
        products, again = matrix.products(digits), matrix.codes()
        added = matrix.added(torch.zeros(2, 67, dtype=torch.bfloat16), digits)
    except (AttributeError, RuntimeError):  # this torch has no such operator, or refuses it
        return False
    exact = (digits.float() - ZERO) @ codes.float().T
    is_exact = torch.equal(again, codes) and torch.equal(products, exact)
    return is_exact and torch.equal(added, (BASE * exact).bfloat16())


class OnednnMatrix:
    """The codes (out, in) and scales (out,) of a matrix, in oneDNN's layout."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.laid_out: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
        """As a tensor that has no storage."""
        self._height = len(codes)
        self._weights = self.laid_out, scales.float(), torch.zeros(1, dtype=torch.int32)

    def codes(self) -> Tensor:
        """A copy of them (out, in) in int8."""
        return self.laid_out.to_dense().T

    def product(self, x: Tensor) -> Tensor:
        """x (N, in) W^T in bf16, (N, out); each row is what it would be in any other company of up to 64 rows."""
        if len(x) == 1:
            of_one, unit = unsigned_digits_of_one(x)
            first, second = self.products(of_one, scale=unit).unbind()
            return torch.add(second, first, alpha=BASE).bfloat16()[None]
        y = x.new_empty(len(x), self._height)
        dtype = torch.float32 if len(x) <= WIDE_DIGITS else torch.bfloat16
        for rows, out in zip(torch.split(x, ROWS_OF_DIGITS), torch.split(y, ROWS_OF_DIGITS), strict=True):
            digits, units = unsigned_digits(rows)
            if len(x) <= DIGITS_TOGETHER:
                products = self.products(digits.flatten(0, 1), dtype)
                torch.add(products[len(rows) :], products[: len(rows)], alpha=BASE, out=out).mul_(units)
            else:
                torch.mul(self.added(self.products(digits[1], dtype), digits[0]), units, out=out)
        return y

    def products(self, digits: Tensor, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Digits (N, in), less 128, by W^T, scaled, (N, out); in fp32 exact if all scales are 1 and the sums small."""
        return torch.ops.onednn.qlinear_pointwise.default(  # type: ignore[no-any-return]
            digits, scale, ZERO, *self._weights, None, 1.0, 0, dtype, "none", [], ""
        )

    def added(self, y: Tensor, digits: Tensor) -> Tensor:
        """y (N, out) in bf16 plus 256 times the product of digits, in y's memory."""
        return torch.ops.onednn.qlinear_pointwise.binary(  # type: ignore[no-any-return]
            digits, float(BASE), ZERO, *self._weights, y, None, 1.0, 0, y.dtype, 1.0, 0, "sum", 1.0, "none", [], ""
        )
