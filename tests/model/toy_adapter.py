"""A second kind of adapter, for tests: the rows of W scaled by 1 + s, with s (out,) trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llamatune.model.adapters.adapted_linear import AdaptedLinear
from llamatune.model.layers import Dropout, Trained


class ScaledLinear(AdaptedLinear):
    toy_scale: nn.Parameter

    def start(self, generator: torch.Generator) -> None:
        """Zero: every row as it is."""

    def forward(
        self, x: Tensor, dropout: Dropout | None = None, out: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        y = super().forward(x, dropout)
        y = torch.mul(y, (1 + self.scaling * self.toy_scale).to(y.dtype), out=out)
        return y if residual is None else torch.add(residual, y, out=out)

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
        factor = (1 + self.scaling * self.toy_scale).to(grad.dtype)
        dx, _ = super().gradients(grad * factor, x, dropout, wants_input, out, add)
        return dx, ((grad * (x @ self.matrix(x.dtype).T)).sum(0).to(self.toy_scale.dtype) * self.scaling,)

    @staticmethod
    def merged(W: Tensor, trained: Trained, scaling: float, rows: slice = slice(None)) -> Tensor:
        return W.float() * (1 + scaling * trained[0][rows].float())[:, None]
