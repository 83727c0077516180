"""Two digits in int8 of each number of x, and int8 codes multiplied by them: for generation in bf16 on a CPU with VNNI.

Each row of x is rounded to multiples of a power of two, and a multiple is 256 times its first digit plus its second
(Ozaki et al. 2012 split matrices so). They hold 15 bits below the largest of a row, more than rounding the products to
bf16 leaves. Products of codes by digits are exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BASE = 256
ZERO = 128
"""An unsigned digit of 0."""
_UNITS = 2**14
"""In the power of two that is not above a row's largest magnitude, or is the next one where that is 255/128 of it:
the digits are from -128 to 127."""
_LEAST_POWER = 2.0**-100
"""In place of a lower one, and of rows of zeros: what is divided by it is finite."""
_MAGNITUDE, _EXPONENT = 0x7FFF, 0x7F80
"""The bits of a bf16 number without its sign, and of its exponent."""
_WHOLE = torch.full((1, 1), 1.5 * 2**23 + ZERO * BASE + ZERO)
"""What is added to it in fp32 is rounded to a whole number, whose digits, unsigned, are the low bytes of the sum."""


def columns_by_digits(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """(x W^T)^T in bf16, (out, N), of x (N, in), N above 1, and W of codes (out, in) and scales (out,).

    Each column is what it would be in any other company.
    """
    multiples, units = _multiples(x)
    second = multiples.to(torch.int8)  # the low byte
    first = multiples.add_(ZERO).bitwise_right_shift_(8).to(torch.int8)
    products = torch._int_mm(codes, torch.cat((first, second)).T).float()  # (out, 2N)
    y = torch.add(products[:, len(x) :], products[:, : len(x)], alpha=BASE).mul_(scales.float()[:, None])
    return y.to(x.dtype).mul_(units.T)


def unsigned_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first digits of x (N, in), in bf16, and the second, in uint8 (2, N, in), and the units (N, 1) in bf16.

    Those of a row are infinite if it is not finite, or holds the largest number of bf16.
    """
    multiples, units = _multiples(x)
    multiples.add_(ZERO * BASE + ZERO - 2**16)  # in 16 bits: to both digits
    digits = torch.empty(2, *x.shape, dtype=torch.uint8)
    digits[1].copy_(multiples)  # the low byte
    digits[0].copy_(multiples.bitwise_right_shift_(8))
    return digits, units


def unsigned_digits_of_one(x: Tensor) -> tuple[Tensor, float]:
    """The same of one row, digits (2, in) and a unit, by fewer calls, which take as long as its product."""
    largest = min(int((x.view(torch.int16) & _MAGNITUDE).max()), _EXPONENT)
    exponent = ((largest + 1 & _EXPONENT) >> 7) - 127
    power = max(2.0**exponent, _LEAST_POWER) if exponent < 128 else math.inf
    bits = torch.add(_WHOLE, x, alpha=_UNITS / power).view(torch.int32)
    return torch.cat((bits >> 8, bits)).to(torch.int8).view(torch.uint8), power / _UNITS


def _multiples(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, in) in whole units of each row, in int16, and the units."""
    largest = (x.view(torch.int16) & _MAGNITUDE).amax(1, keepdim=True).clamp_max_(_EXPONENT)
    powers = largest.add_(1).bitwise_and_(_EXPONENT).view(x.dtype).clamp_min_(_LEAST_POWER)
    return x.float().mul_(_UNITS / powers).round_().to(torch.int16), powers.mul_(1 / _UNITS)
