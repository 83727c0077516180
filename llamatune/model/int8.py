"""Int8 quantisation of frozen weights, with a scale for each output channel: one byte a weight.

The codes are from -127 to 127, and a weight is off by half a scale at most. A scale is the least bf16 with which the
row's largest magnitude fits into 127. torch's kernel on a CPU takes scales in bf16, so it computes with the numbers of
the unpacked matrix.

The kernel, ``torch._weight_int8pack_mm``, reads the codes and nothing else. It is quicker than a product in bf16 for a
few rows, as in decoding one prompt, and slower than unpacking for more. In fp32 it is always slower than unpacking.

For some more rows of generation x is written with two digits in int8 (Ozaki et al. 2012 split matrices so), and
``torch._int_mm`` multiplies codes by digits exactly. The digits hold 15 bits below the largest of a row, more than
rounding the products to bf16 leaves. ``benchmarks/few_rows.py`` measures it. For a longer prompt the codes are cast,
of large matrices by oneDNN (``onednn_int8``), and the products are scaled.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model.adjacent_tensors import adjacent
from llamatune.model.onednn_int8 import casts_codes, product_with_codes
from llamatune.model.packed_weight import PackedWeight, Scratch
from llamatune.model.products import LEAST_ELEMENTS, in_rows
from llamatune.processor import has_amx
from llamatune.shapes.tile_sizes import CAST_AT_ONCE, WEIGHTS_AT_ONCE

LARGEST = 127
_LEAST_SCALE = 2.0**-126
"""The least normal number; of rows of zeros."""
_MOST_ROWS = 8
"""Of x, that the kernel is quicker for than unpacking; it takes time for each, and torch's product hardly."""
_MOST_ROWS_OF_DIGITS = 64
"""Of x, that two digits are quicker for than unpacking, of a matrix that is read from memory."""
_MOST_COLUMNS, _MOST_TRANSPOSED = 256, 128
"""Of x, that cast codes are quicker for as the left factor: with the columns as they come, and put into rows."""
_BASE = 128
"""Of the digits: x is a multiple of its scale, which is the base times the first digit plus the second."""
_COLUMNS = 32
"""The kernel reads beyond the end of rows that are not in whole vectors."""


class Int8Weight(PackedWeight):
    """A frozen matrix (out, in) in int8."""

    codes: Tensor
    scales: Tensor
    _by_parts: Sequence[Int8Weight] = ()
    """Of joined matrices, each: the bits of few rows are those of their products apart."""

    @staticmethod
    def storage(shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {"codes": (torch.int8, shape), "scales": (torch.bfloat16, shape[:1])}

    @classmethod
    @torch.no_grad()
    def quantize(cls, W: Tensor, scratch: Scratch) -> Self:
        low, high = W.aminmax(dim=1)
        scales = _bf16_above(torch.maximum(high, -low).float() / LARGEST)
        codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
        step = _rows_at_once(W)
        for rows, scale, into in zip(*_pieces(step, W, scales.float(), codes), strict=True):
            into.copy_((rows.float() / scale[:, None]).round_())
        return cls(tuple(W.shape), {"codes": codes, "scales": scales}, scratch)

    def unpack_into(self, flat: Tensor) -> None:
        W, step = flat.view(self.shape), _rows_at_once(self.codes)
        scales = self.scales if W.dtype == torch.bfloat16 else self.scales.float()  # fp16 has no numbers so small
        for codes, scale, into in zip(*_pieces(step, self.codes, scales, W), strict=True):
            into.copy_(codes).mul_(scale[:, None])

    @classmethod
    @torch.no_grad()
    def joined(cls, parts: Sequence[Self]) -> Self | None:
        rows, columns = [part.shape[0] for part in parts], parts[0].shape[1]
        codes = adjacent([part.codes for part in parts])
        if codes is None:
            if sum(rows) * columns >= LEAST_ELEMENTS:
                return None
            codes = torch.cat([part.codes for part in parts])
        tensors = {"codes": codes, "scales": torch.cat([part.scales for part in parts])}
        for name, whole in tensors.items():
            for part, own in zip(parts, torch.split(whole, rows), strict=True):
                setattr(part, name, own)
        joined = cls((sum(rows), columns), tensors, parts[0].scratch)
        joined._by_parts, joined.any_layout = parts, parts[0].any_layout
        return joined

    def multiplies_joined(self, x: Tensor) -> bool:
        if x.numel() <= _MOST_ROWS_OF_DIGITS * self.shape[1]:
            return self.multiplies_codes(x) or self.multiplies_digits(x)
        is_small = self.room <= CAST_AT_ONCE
        return self.casts_in_product(x) or (is_small and x.dtype == torch.bfloat16 and self.scales_products(x))

    def product(self, x: Tensor, out: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.multiplies_codes(x):
            y = torch._weight_int8pack_mm(rows.contiguous(), self.codes, self.scales)
        elif self.multiplies_digits(x):
            y = self._by_digits(rows)
        elif self.casts_in_product(x):
            y = product_with_codes(rows, self.codes, self.scales)
        elif self.scales_products(x):
            y = self._by_cast_codes(rows)
        else:
            return super().product(x, out, added)
        if x.dim() != 2 and torch.is_inference_mode_enabled():
            y = y.view(*x.shape[:-1], self.shape[0])
        elif x.dim() != 2:  # autograd refuses to add a bias to a view that a function returns
            y = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], self.shape[0]))
        if added is not None:
            y.add_(added)
        return y if out is None else out.copy_(y)

    def multiplies_codes(self, x: Tensor) -> bool:
        """Whether the product with ``x`` is the kernel's."""
        is_few = 0 < x.numel() <= _MOST_ROWS * self.shape[1] and self.shape[1] % _COLUMNS == 0
        return is_few and x.dtype == torch.bfloat16 and x.device.type == "cpu"

    def multiplies_digits(self, x: Tensor) -> bool:
        """Whether the product with ``x``, if it is not the kernel's, is that of codes by digits.

        In generation alone: the bits of a training step do not depend on whether a pass is for gradients.
        """
        least = min(part.codes.numel() for part in self._by_parts or (self,))
        suits = 0 < x.numel() <= _MOST_ROWS_OF_DIGITS * self.shape[1] and least >= LEAST_ELEMENTS
        is_quick = suits and x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.cpu._is_vnni_supported()
        return is_quick and torch.is_inference_mode_enabled()

    def casts_in_product(self, x: Tensor) -> bool:
        """Whether the product with ``x`` of more rows is one in which oneDNN casts the codes, in generation alone."""
        suits = x.numel() > _MOST_ROWS_OF_DIGITS * self.shape[1] and self.codes.numel() >= LEAST_ELEMENTS
        is_bf16 = x.dtype == torch.bfloat16 and x.device.type == "cpu"
        return suits and is_bf16 and torch.is_inference_mode_enabled() and casts_codes()

    def scales_products(self, x: Tensor) -> bool:
        """Whether the product with ``x``, if it is no other, is scaled in place of the weights, which are more.

        In generation alone, as above. fp16 has no numbers as large as products of codes may be.
        """
        return x.dtype != torch.float16 and x.device.type == "cpu" and torch.is_inference_mode_enabled()

    def _by_cast_codes(self, x: Tensor) -> Tensor:
        """x (N, in) W^T; bf16 of not too many rows with the codes as the left factor, as ``few_rows_linear``."""
        W = self._cast_codes(x.dtype)
        most = _MOST_COLUMNS if self.any_layout else _MOST_TRANSPOSED
        if x.dtype != torch.bfloat16 or len(x) > most or not has_amx():
            return F.linear(x, W).mul_(self.scales)
        return in_rows(torch.mm(W, x.T).mul_(self.scales[:, None]), self.any_layout)

    def _cast_codes(self, dtype: torch.dtype) -> Tensor:
        """The codes in the shared buffer, as ``unpacked`` has the weights."""
        flat = self.scratch.filled((weakref.ref(self), "codes"), self.room, dtype, self.device, self._cast_codes_into)
        return flat.view(self.shape)

    def _cast_codes_into(self, flat: Tensor) -> None:
        flat.view(self.shape).copy_(self.codes)

    def _by_digits(self, x: Tensor) -> Tensor:
        """x (N, in) W^T; each row is what it would be in any other company."""
        wide = x.float()
        scales = wide.abs().amax(1, keepdim=True).div_(LARGEST * _BASE).clamp_min_(_LEAST_SCALE)  # (N, 1)
        multiples = wide.div_(scales).round_()
        first = multiples.div(_BASE).round_()
        second = multiples.sub_(first, alpha=_BASE)
        digits = torch.cat((first, second)).to(torch.int8)  # (2N, in)
        products = torch._int_mm(self.codes, digits.T).float()  # (out, 2N)
        y = torch.add(products[:, len(x) :], products[:, : len(x)], alpha=_BASE).mul_(self.scales.float()[:, None])
        return in_rows(y.mul_(scales.T).to(x.dtype), self.any_layout)  # attention's kernel wants rows


def _bf16_above(x: Tensor) -> Tensor:
    """The least bf16 that is not below x (fp32, not negative), and a normal number."""
    bits = x.clamp_min(_LEAST_SCALE).view(torch.int32)
    return (bits + 0xFFFF).bitwise_and_(-0x10000).view(torch.float32).to(torch.bfloat16)


def _pieces(step: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """So many rows at a time of each."""
    return [torch.split(tensor, step) for tensor in tensors]


def _rows_at_once(W: Tensor) -> int:
    """Rows that are packed or unpacked in one piece."""
    return max(1, WEIGHTS_AT_ONCE[W.device.type] // max(1, W.shape[1]))
