"""Float8 (e4m3) of frozen weights with a scale for each row, an output channel: one byte a weight.

A scale is the least power of two with which the row's largest magnitude fits into 448, the largest e4m3. e4m3 rounds
relatively (to 2⁻⁴ at most, down to 2⁻⁶ of its numbers), so a scale between two powers of two would not be more exact,
and these change no bit of what they multiply: W unpacked to bf16 is exactly the quantised W.

On a GPU with float8 products (``shapes.float8_products``), the rows of x are quantised too, as they come, each with its
largest magnitude at 448, and ``torch._scaled_mm`` multiplies. A row of x is a token, so that what a token gives does
not depend on the others of a pass. Elsewhere W is unpacked.

The backward product grad W sums over the rows of W, so W's scales cannot be put behind it. They are multiplied into
grad, exactly, before its rows are quantised, and the codes are the second factor without scales. ``_scaled_mm`` takes
this factor only with the summed dimension contiguous, as W^T (in, out) has it. The codes are turned into the shared
buffer at each use: 2 bytes of traffic a weight. Holding W^T beside W would cost 6 GiB for a 7B; unpacking to bf16 moves
7 bytes a weight without a kernel of its own, and its product takes twice as long; one scale for a whole matrix would
not have to be folded into grad, but needs the same turning and makes rows of small weights inexact.
"""

from __future__ import annotations

import weakref
from typing import Self

import torch
from torch import Tensor

from llamatune.devices import capability_of
from llamatune.model.kernels.choice import by_kernel
from llamatune.model.packed_weight import PackedWeight, Scratch
from llamatune.model.torch_dtypes import DTYPE_NAMES
from llamatune.shapes.float8_products import LARGEST, LEAST_SCALE, runs_in_float8
from llamatune.shapes.tile_sizes import WEIGHTS_AT_ONCE


class Float8Weight(PackedWeight):
    """A frozen matrix (out, in) in float8."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def storage(shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"codes": (torch.float8_e4m3fn, shape), "scales": (torch.float32, shape[:1])}

    @classmethod
    @torch.no_grad()
    def quantize(cls, W: Tensor, scratch: Scratch) -> Self:
        scales = _power_of_two(_largest(W) / LARGEST)  # (out, 1)
        codes = torch.empty(W.shape, dtype=torch.float8_e4m3fn, device=W.device)
        for rows, scale, into in zip(_pieces(W), _pieces(scales, W), _pieces(codes), strict=True):
            into.copy_(rows.float() / scale)
        return cls(tuple(W.shape), {"codes": codes, "scales": scales.view(-1)}, scratch)

    def unpack_into(self, flat: Tensor) -> None:
        W, scales = flat.view(self.shape), self.scales[:, None]
        if W.is_cuda:
            W.copy_(self.codes).mul_(scales)
            return
        numbers: Tensor = self.scratch.table(_numbers, flat.dtype, self.device)
        for codes, scale, into in zip(_pieces(self.codes), _pieces(scales, self.codes), _pieces(W), strict=True):
            # torch casts one number after the other on a CPU, in three times the time of this.
            torch.index_select(numbers, 0, codes.view(torch.uint8).view(-1).int(), out=into.view(-1))
            into.mul_(scale)

    def product(self, x: Tensor, out: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        if not self.multiplies_in_float8(x):
            return super().product(x, out, added)
        codes, scales = quantize_rows(x.reshape(-1, x.shape[-1]))
        y = _scaled_product(codes, self.codes, scales, self.scales[None], x.dtype, out)
        return y.view(*x.shape[:-1], -1) if added is None else y.add_(added)

    def product_back(self, grad: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
        if not self.multiplies_in_float8(grad):
            return super().product_back(grad, out, add)
        codes, scales = quantize_rows(grad.reshape(-1, grad.shape[-1]), self.scales)
        room = self.codes.numel(), self.codes.dtype, self.device
        turned = self.scratch.filled(weakref.ref(self), *room, self.turn_into).view(self.shape[::-1])
        ones: Tensor = self.scratch.table(_ones, self.shape[1], self.device)
        dx = _scaled_product(codes, turned, scales, ones, grad.dtype, None if add else out)
        if add:
            assert out is not None
            return out.add_(dx)
        return dx.view(*grad.shape[:-1], -1)

    def turn_into(self, flat: Tensor) -> None:
        """Write the codes of W^T, row after row, into ``flat``."""
        transpose_bytes(self.codes.view(torch.uint8), flat.view(torch.uint8).view(self.shape[::-1]))

    def multiplies_in_float8(self, x: Tensor) -> bool:
        """Whether the product with ``x``, its other factor, quantises it. ``_scaled_mm`` wants rows."""
        return x.numel() > 0 and runs_in_float8(capability_of(self.device), DTYPE_NAMES[x.dtype], self.shape)


def _scaled_product(
    a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    """a b^T of codes, times the scales of their rows (N, 1) and (1, M), in ``out`` or in a new tensor."""
    if out is None:
        return torch._scaled_mm(a, b.t(), a_scales, b_scales, out_dtype=dtype)
    return torch._scaled_mm(a, b.t(), a_scales, b_scales, out_dtype=dtype, out=out)


@by_kernel("float8")
def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """e4m3 codes (N, D) and fp32 scales (N, 1) of x (N, D): codes · scales is x, and the largest code of a row is 448.

    ``factors`` are powers of two (D,), fp32, that x is multiplied by first, which rounds nothing in x's dtype. A row
    with NaN or infinity holds NaN.
    """
    if factors is not None:
        x = x * factors.to(x.dtype)
    scales = (_largest(x) / LARGEST).clamp_min_(LEAST_SCALE)
    return torch.div(x, scales, out=torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)), scales


@by_kernel("float8")
def transpose_bytes(codes: Tensor, out: Tensor) -> None:
    """Write the transpose of ``codes`` (R, C) into ``out`` (C, R), both uint8."""
    out.copy_(codes.t())


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of each row, fp32 (N, 1), without a copy of x."""
    low, high = x.aminmax(dim=1, keepdim=True)
    return torch.maximum(high, -low).float()


def _power_of_two(x: Tensor) -> Tensor:
    """The least power of two that is not below x, and a normal fp32; 1 for 0."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa · 2^exponent, the mantissa from 1/2 to 1
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int()).clamp_min_(LEAST_SCALE)


def _pieces(x: Tensor, of: Tensor | None = None) -> tuple[Tensor, ...]:
    """Rows of x, as many at a time as of ``of`` (x by default) are unpacked in one piece."""
    of = x if of is None else of
    return torch.split(x, max(1, WEIGHTS_AT_ONCE[of.device.type] // max(1, of.shape[1])))


def _numbers(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The number of each of the 256 codes."""
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).to(dtype)


def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(1, count, device=device)
