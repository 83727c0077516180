"""DoRA (Liu et al. 2024): W' = m · (W + s B A) / |W + s B A|, with the norm of each row; A, B and m (out,) are trained.

The norm gets no gradient (section 4.3). Dropout acts as in PEFT: y = W x + (g - 1) · W d + g · s B A d, where d is x
after dropout and g = m / |W + s B A|; without dropout that is g · (W + s B A) x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamatune.model.adapters.lora import LoRALinear
from llamatune.model.layers import Dropout, Trained, linear, product_dtype
from llamatune.model.products import product, scaled_product
from llamatune.shapes.tile_sizes import NORMED_AT_ONCE


class _Factors(NamedTuple):
    """What hand-written products take: norms and g (out,) in the dtype of m; in that of x g - 1, A, and g · B as B.

    g itself would be rounded to 1 in 16 bits while it is near to it.
    """

    norms: Tensor
    g: Tensor
    g_minus_1: Tensor
    A: Tensor
    B: Tensor


class DoRALinear(LoRALinear):
    """A frozen matrix, its trained low-rank update and the trained magnitudes of the rows of the sum."""

    lora_magnitude_vector: nn.Parameter
    casts_for_window = False

    def start(self, generator: torch.Generator) -> None:
        """A and B as of LoRA; the magnitudes are those of the rows of W."""
        super().start(generator)
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(self._row_norms(product_dtype(self.lora_A)))

    def forward(
        self, x: Tensor, dropout: Dropout | None = None, out: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if dropout is not None:
            factors = self._factors(x.dtype)
            y = self._base(x, out if residual is None else None)
            dropped, mask = dropout.drop(x)
            y.addcmul_(y if mask is None else self._base(dropped), factors.g_minus_1)
            y.addmm_(dropped @ factors.A.T, factors.B.T, alpha=self.scaling)
            if self.bias is not None:
                y.add_(self.bias.to(y.dtype))
            return y if residual is None else torch.add(residual, y, out=out)
        return self.updated(x, super(LoRALinear, self).forward(x))

    def updated(self, x: Tensor, y: Tensor) -> Tensor:
        drops = self.dropout > 0 and self.training
        dropped = F.dropout(x, self.dropout) if drops else x
        base = y
        if drops or self.bias is not None:
            base = linear(dropped, self.weight) if self.quantized is None else self.quantized(dropped)
        if not torch.is_autocast_enabled(x.device.type):
            dropped = dropped.to(self.lora_A.dtype)
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B)  # (..., R) -> (..., out)
        g = self.lora_magnitude_vector / self._norms(product_dtype(x))
        return self.switched(y + ((g - 1) * base + (g * self.scaling) * update).to(y.dtype), y)

    def gradients(
        self,
        grad: Tensor,
        x: Tensor | None,
        dropout: Dropout,
        wants_input: bool,
        out: Tensor | None = None,
        add: bool = False,
    ) -> tuple[Tensor | None, Trained]:
        assert x is not None
        norms, g, g_minus_1, A, B = self._factors(grad.dtype)
        dropped, mask = dropout.drop(x)
        outer = scaled_product(grad.T, dropped @ A.T, self.scaling, norms.dtype)  # (out, R)
        dt = scaled_product(grad, B, self.scaling)  # (N, R)
        dA = scaled_product(dt.T, dropped, dtype=norms.dtype)
        # W d again: keeping it would take as much memory as every output.
        room = self._base(dropped)
        dm = (room.mul_(grad).sum(0, dtype=norms.dtype) + (self.lora_B * outer).sum(1)) / norms
        dx: Tensor | None = None
        if wants_input and mask is None:
            scaled = torch.addcmul(grad, grad, g_minus_1, out=room)
            dx, _ = super(LoRALinear, self).gradients(scaled, None, dropout, True, out, add)
            assert dx is not None
            dx.addmm_(dt, A)
        elif wants_input:
            assert mask is not None
            dx, _ = super(LoRALinear, self).gradients(grad, None, dropout, True, out, add)
            behind, _ = super(LoRALinear, self).gradients(torch.mul(grad, g_minus_1, out=room), None, dropout, True)
            assert dx is not None
            assert behind is not None
            dropout.add_gradient(dx, behind.addmm_(dt, A), mask)
        return dx, (dA, outer.mul_(g[:, None]), dm)

    @staticmethod
    def merged(W: Tensor, trained: Trained, scaling: float, rows: slice = slice(None)) -> Tensor:
        """m · (W + scaling · B A) / its norm, row by row; a row of zeros stays one."""
        A, B, magnitude = trained
        updated = LoRALinear.merged(W, (A, B), scaling, rows)
        return updated.mul_((magnitude[rows].float() / _without_zeros(updated.norm(dim=1)))[:, None])

    def _base(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """W x, without autograd and without the bias, which m does not scale."""
        return product(x, self.matrix(x.dtype).T, out) if self.quantized is None else self.quantized.product(x, out)

    def _factors(self, dtype: torch.dtype) -> _Factors:
        def make() -> _Factors:
            with torch.no_grad():
                norms = self._norms(dtype)
                g = self.lora_magnitude_vector / norms
                return _Factors(
                    norms, g, (g - 1).to(dtype), self.lora_A.to(dtype), (self.lora_B * g[:, None]).to(dtype)
                )

        return self.derived(("factors", dtype), make)

    def _norms(self, dtype: torch.dtype) -> Tensor:
        """The norm of each row of W + s B A, infinite for one of zeros: it has no direction to be scaled."""
        return self.derived(("norms", dtype), lambda: _without_zeros(self._row_norms(dtype)))

    @torch.no_grad()
    def _row_norms(self, dtype: torch.dtype) -> Tensor:
        """|W + s B A| of each row, some rows at a time; a quantised W is unpacked to ``dtype``, as for products."""
        A, B = self.lora_A, self.lora_B
        W = self.weight if self.quantized is None else self.quantized.unpacked(dtype)
        norms, rows = torch.empty_like(B[:, 0]), max(1, NORMED_AT_ONCE[A.device.type] // self.in_features)
        with torch.autocast(A.device.type, enabled=False):
            for first in range(0, self.out_features, rows):
                part = slice(first, first + rows)
                updated = torch.addmm(W[part].to(A.dtype), B[part], A, alpha=self.scaling)
                norms[part] = torch.linalg.vector_norm(updated, dim=1)
        return norms


def _without_zeros(norms: Tensor) -> Tensor:
    return norms.masked_fill(norms == 0, torch.inf)
