"""Int8 quantisation of frozen weights, with a scale for each output channel: one byte a weight.

The codes are from -127 to 127, and a weight is off by half a scale at most. A scale is the least bf16 with which the
row's largest magnitude fits into 127. torch's kernel on a CPU takes scales in bf16, so it computes with the numbers of
the unpacked matrix.

The kernel, ``torch._weight_int8pack_mm``, reads the codes and nothing else. It is quicker than a product in bf16 for a
few rows, as in decoding one prompt, and slower than unpacking for more. In fp32 it is always slower than unpacking.

For some more rows of generation the codes are multiplied by digits of x (``int8_digits``), which
``benchmarks/few_rows.py`` measures. For a longer prompt they are cast, those of larger matrices by oneDNN
(``int8_casts``), and the products are scaled. The largest matrices are held in oneDNN's layout (``onednn_layout``) for
generation in bf16, on processors that gain by it, and multiplied by digits, whatever the rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model.adjacent_tensors import adjacent
from llamatune.model.int8_casts import casts_codes, product_with_codes
from llamatune.model.int8_digits import columns_by_digits
from llamatune.model.onednn_layout import OnednnMatrix, has_onednn_layout
from llamatune.model.packed_weight import PackedWeight, Scratch
from llamatune.model.products import LEAST_ELEMENTS, in_rows
from llamatune.processor import has_amx
from llamatune.shapes.int8_products import CAST_AT_ONCE, LEAST_IN_ONEDNN_LAYOUT
from llamatune.shapes.tile_sizes import WEIGHTS_AT_ONCE

LARGEST = 127
_LEAST_SCALE = 2.0**-126
"""The least normal number; of rows of zeros."""
_MOST_ROWS = 8
"""Of x, that the kernel is quicker for than unpacking; it takes time for each, and torch's product hardly."""
_MOST_ROWS_OF_DIGITS = 64
"""Of x, that two digits are quicker for than unpacking, of a matrix that is read from memory."""
_MOST_COLUMNS, _MOST_TRANSPOSED = 256, 128
"""Of x, that cast codes are quicker for as the left factor: with the columns as they come, and put into rows."""
_COLUMNS = 32
"""The kernel reads beyond the end of rows that are not in whole vectors."""


class Int8Weight(PackedWeight):
    """A frozen matrix (out, in) in int8."""

    codes: Tensor
    scales: Tensor
    _by_parts: Sequence[Int8Weight] = ()
    """Of joined matrices, each: the bits of few rows are those of their products apart."""
    _in_layout: OnednnMatrix | None = None
    """The codes once they are rearranged, alone or with those of other matrices."""
    _own_rows = slice(None)
    """Of what is in the layout: all, or those of one of the joined matrices."""

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
        W = flat.view(self.shape)
        step = _rows_at_once(W)
        scales = self.scales if W.dtype == torch.bfloat16 else self.scales.float()  # fp16 has no numbers so small
        for codes, scale, into in zip(*_pieces(step, self._codes_in_rows(), scales, W), strict=True):
            into.copy_(codes).mul_(scale[:, None])

    @classmethod
    @torch.no_grad()
    def joined(cls, parts: Sequence[Self]) -> Self | None:
        rows, columns = [part.shape[0] for part in parts], parts[0].shape[1]
        codes = adjacent([part.codes for part in parts])
        if codes is None:
            elements = sum(rows) * columns
            if elements >= LEAST_ELEMENTS and not cls.is_rearranged(elements):
                return None
            codes = torch.cat([part.codes for part in parts])
        tensors = {"codes": codes, "scales": torch.cat([part.scales for part in parts])}
        for name, whole in tensors.items():
            for part, own in zip(parts, torch.split(whole, rows), strict=True):
                setattr(part, name, own)
        joined = cls((sum(rows), columns), tensors, parts[0].scratch)
        joined._by_parts, joined.any_layout = parts, parts[0].any_layout
        return joined

    @classmethod
    def is_rearranged(cls, elements: int) -> bool:
        return elements >= LEAST_IN_ONEDNN_LAYOUT and has_onednn_layout()

    def rearrange(self) -> None:
        if self.device.type != "cpu" or not self.is_rearranged(self.codes.numel()):
            return
        matrix, begin = OnednnMatrix(self.codes, self.scales), 0
        for part in self._by_parts:
            part._take(matrix, slice(begin, begin + part.shape[0]))
            begin += part.shape[0]
        self._take(matrix, slice(None))

    def _take(self, matrix: OnednnMatrix, own_rows: slice) -> None:
        self._in_layout, self._own_rows = matrix, own_rows
        self.codes = self.codes.new_empty(0, self.shape[1])
        self.register_buffer("laid_out", matrix.laid_out, persistent=False)

    def _codes_in_rows(self) -> Tensor:
        if self._in_layout is None:
            return self.codes
        return self._in_layout.codes()[self._own_rows]

    def multiplies_joined(self, x: Tensor) -> bool:
        if self._in_layout is not None:
            return self.multiplies_in_layout(x)
        if x.numel() <= _MOST_ROWS_OF_DIGITS * self.shape[1]:
            return self.multiplies_codes(x) or self.multiplies_digits(x)
        is_small = self.room <= CAST_AT_ONCE
        return self.casts_in_product(x) or (is_small and x.dtype == torch.bfloat16 and self.scales_products(x))

    def product(self, x: Tensor, out: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._in_layout is not None:
            if not self.multiplies_in_layout(x):
                return super().product(x, out, added)
            y = self._in_layout.product(rows)[:, self._own_rows]
        elif self.multiplies_codes(x):
            y = torch._weight_int8pack_mm(rows.contiguous(), self.codes, self.scales)
        elif self.multiplies_digits(x):
            y = in_rows(columns_by_digits(rows, self.codes, self.scales), self.any_layout)  # attention wants rows
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

    def multiplies_in_layout(self, x: Tensor) -> bool:
        """Whether the product with ``x`` of rearranged codes is by digits; in another dtype they are unpacked."""
        return self._in_layout is not None and x.dtype == torch.bfloat16 and x.numel() > 0

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
