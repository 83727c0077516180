"""Int8 codes multiplied by x in two int8 digits, as integers: for generation in bf16 on a CPU with VNNI.

Each row of x is rounded to multiples of a power of two, and a multiple is 256 times its first digit plus its second
(Ozaki et al. 2012 split matrices so). They hold 15 bits below the largest of a row, more than rounding the products to
bf16 leaves. Codes in rows are multiplied by ``torch._int_mm``, and those of a large matrix in oneDNN's own layout, in
blocks, which its kernel reads faster.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from llamatune.processor import multiplies_int8_blocks
from llamatune.shapes.tile_sizes import DIGITS_TOGETHER, ROWS_OF_DIGITS, WIDE_DIGITS

_BASE = 256
_UNITS = 2**14
"""In the power of two that is not above a row's largest magnitude, or is the next one where that is 255/128 of it:
the digits are from -128 to 127."""
_LEAST_POWER = 2.0**-100
"""In place of a lower one, and of rows of zeros: what is divided by it is finite."""
_MAGNITUDE, _EXPONENT = 0x7FFF, 0x7F80
"""The bits of a bf16 number without its sign, and of its exponent."""
_ZERO = 128
"""An unsigned digit of 0; oneDNN's kernel takes unsigned ones."""
_UNSIGNED = _ZERO * _BASE + _ZERO - 2**16
"""Added to a multiple, in 16 bits, it adds that to both digits."""


_WHOLE = torch.full((1, 1), 1.5 * 2**23 + _ZERO * _BASE + _ZERO)
"""What is added to it in fp32 is rounded to a whole number, whose digits, unsigned, are the low bytes of the sum."""


@functools.cache
def has_blocks() -> bool:
    """Whether codes can be held in oneDNN's layout here: its products are exact, and the codes come back."""
    if not multiplies_int8_blocks():
        return False
    codes = torch.arange(67 * 70).mul_(37).remainder_(255).sub_(127).to(torch.int8).view(67, 70)
    digits = torch.arange(2 * 70).mul_(51).remainder_(256).to(torch.uint8).view(2, 70)
    try:
        blocks = CodeBlocks(codes, torch.ones(67))
        products, again = blocks.products(digits), blocks.codes()
        added = blocks._added(torch.zeros(2, 67, dtype=torch.bfloat16), digits)
    except (AttributeError, RuntimeError):  # this torch has no such operator, or refuses it
        return False
    exact = (digits.float() - _ZERO) @ codes.float().T
    is_exact = torch.equal(again, codes) and torch.equal(products, exact)
    return is_exact and torch.equal(added, (_BASE * exact).bfloat16())


def columns_by_digits(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(x W^T)^T in bf16, (out, N), of x (N, in), N above 1, and W of codes (out, in) and scales (out,).

    Each column is what it would be in any other company.
    """
    multiples, units = _multiples(x)
    second = multiples.to(torch.int8)  # the low byte
    first = multiples.add_(_ZERO).bitwise_right_shift_(8).to(torch.int8)
    products = torch._int_mm(codes, torch.cat((first, second)).T).float()  # (out, 2N)
    y = torch.add(products[:, len(x) :], products[:, : len(x)], alpha=_BASE).mul_(scales.float()[:, None])
    return y.to(x.dtype).mul_(units.T)


class CodeBlocks:
    """The codes (out, in) and scales (out,) of a matrix, in oneDNN's layout."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.blocks: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
        """As a tensor that has no storage."""
        self.height = len(codes)
        self._scales, self._zeros = scales.float(), torch.zeros(1, dtype=torch.int32)

    def codes(self) -> Tensor:
        """A copy of them (out, in) in int8."""
        return self.blocks.to_dense().T

    def product(self, x: Tensor) -> Tensor:
        """x (N, in) W^T in bf16, (N, out); each row is what it would be in any other company of up to 64 rows."""
        if len(x) == 1:
            return self._product_of_one(x)
        y = x.new_empty(len(x), self.height)
        dtype = torch.float32 if len(x) <= WIDE_DIGITS else torch.bfloat16
        for rows, out in zip(torch.split(x, ROWS_OF_DIGITS), torch.split(y, ROWS_OF_DIGITS), strict=True):
            multiples, units = _multiples(rows)
            multiples.add_(_UNSIGNED)
            digits = torch.empty(2, *rows.shape, dtype=torch.uint8)
            digits[1].copy_(multiples)  # the low byte
            digits[0].copy_(multiples.bitwise_right_shift_(8))
            if len(x) <= DIGITS_TOGETHER:
                products = self.products(digits.flatten(0, 1), dtype)
                torch.add(products[len(rows) :], products[: len(rows)], alpha=_BASE, out=out).mul_(units)
            else:
                torch.mul(self._added(self.products(digits[1], dtype), digits[0]), units, out=out)
        return y

    def _product_of_one(self, x: Tensor) -> Tensor:
        """The same numbers by fewer calls, which take as long as the product."""
        largest = min(int((x.view(torch.int16) & _MAGNITUDE).max()), _EXPONENT)
        exponent = ((largest + 1 & _EXPONENT) >> 7) - 127
        power = max(2.0**exponent, _LEAST_POWER) if exponent < 128 else math.inf
        bits = torch.add(_WHOLE, x, alpha=_UNITS / power).view(torch.int32)
        digits = torch.cat((bits >> 8, bits)).to(torch.int8).view(torch.uint8)
        first, second = self.products(digits, scale=power / _UNITS).unbind()
        return torch.add(second, first, alpha=_BASE).bfloat16()[None]

    def products(self, digits: Tensor, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Digits (N, in), less 128, by W^T, scaled, (N, out); in fp32 exact if all scales are 1 and the sums small."""
        return torch.ops.onednn.qlinear_pointwise.default(  # type: ignore[no-any-return]
            digits, scale, _ZERO, self.blocks, self._scales, self._zeros, None, 1.0, 0, dtype, "none", [], ""
        )

    def _added(self, y: Tensor, digits: Tensor) -> Tensor:
        """y (N, out) in bf16 plus 256 times the product of first digits, in y's memory."""
        weights = self.blocks, self._scales, self._zeros
        return torch.ops.onednn.qlinear_pointwise.binary(  # type: ignore[no-any-return]
            digits, float(_BASE), _ZERO, *weights, y, None, 1.0, 0, y.dtype, 1.0, 0, "sum", 1.0, "none", [], ""
        )


def _multiples(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, in) in whole units of each row, in int16, and the units (N, 1) in x's dtype.

    These are infinite if the row is not finite, or holds the largest number of bf16.
    """
    largest = (x.view(torch.int16) & _MAGNITUDE).amax(1, keepdim=True).clamp_max_(_EXPONENT)
    powers = largest.add_(1).bitwise_and_(_EXPONENT).view(x.dtype).clamp_min_(_LEAST_POWER)
    return x.float().mul_(_UNITS / powers).round_().to(torch.int16), powers.mul_(1 / _UNITS)
