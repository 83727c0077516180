"""LoRA (Hu et al. 2021): W x + (alpha / r) · B A x with W frozen, A (R, in) and B (out, R) trained in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamatune.model.adapters.adapted_linear import AdaptedLinear
from llamatune.model.layers import Dropout, Trained


class LoRALinear(AdaptedLinear):
    """A frozen matrix and its trained low-rank update."""

    lora_A: nn.Parameter  # noqa: N815 - the paper's name
    lora_B: nn.Parameter  # noqa: N815

    def start(self, generator: torch.Generator) -> None:
        """A is Kaiming-uniform with gain as in the reference implementation (bound 1/sqrt(in)), B is zero."""
        bound = 1 / math.sqrt(self.in_features)
        drawn = torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(drawn)

    def forward(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        y = super().forward(x, dropout)  # (..., out)
        if dropout is not None:
            mask = dropout.mask(x)
            t = (x if mask is None else x * mask) @ self.lora_A.to(x.dtype).T  # (N, R)
            return y.addmm_(t, self.lora_B.to(x.dtype).T, alpha=self.scaling)
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if not torch.is_autocast_enabled(x.device.type):
            dropped = dropped.to(self.lora_A.dtype)
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B)  # (..., R) -> (..., out)
        return y + (update * self.scaling).to(y.dtype)

    def gradients(
        self, grad: Tensor, x: Tensor | None, dropout: Dropout, wants_input: bool
    ) -> tuple[Tensor | None, Trained]:
        assert x is not None
        dx, _ = super().gradients(grad, x, dropout, wants_input)
        A, B = self.lora_A.to(grad.dtype), self.lora_B.to(grad.dtype)
        mask = dropout.mask(x)
        dropped = x if mask is None else x * mask
        dB = (grad.T @ (dropped @ A.T)).to(self.lora_B.dtype).mul_(self.scaling)
        dt = (grad @ B).mul_(self.scaling)  # (N, R)
        dA = (dt.T @ dropped).to(self.lora_A.dtype)
        if dx is not None:
            if mask is None:
                dx.addmm_(dt, A)
            else:
                dx.add_((dt @ A).mul_(mask))
        return dx, (dA, dB)

    @staticmethod
    def merged(W: Tensor, trained: Trained, scaling: float, rows: slice = slice(None)) -> Tensor:
        """W + scaling · B A."""
        A, B = trained
        return W.float() + (B[rows].float() @ A.float()) * scaling
