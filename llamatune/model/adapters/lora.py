"""LoRA (Hu et al. 2021): W x + (alpha / r) · B A x with W frozen, A (R, in) and B (out, R) trained in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamatune.model.adapters.adapted_linear import AdaptedLinear
from llamatune.model.layers import Dropout, Trained
from llamatune.model.products import scaled_product


class LoRALinear(AdaptedLinear):
    """A frozen matrix and its trained low-rank update."""

    lora_A: nn.Parameter  # noqa: N815 - the paper's name
    lora_B: nn.Parameter  # noqa: N815

    @property
    def trains_A(self) -> bool:  # noqa: N802
        """LoRA-FA (Zhang et al. 2023) does not."""
        return "lora_A" in self.trained_names

    def start(self, generator: torch.Generator) -> None:
        """A is Kaiming-uniform with gain as in the reference implementation (bound 1/sqrt(in)), or Gaussian as PEFT
        draws it (standard deviation 1/r), B is zero.
        """
        drawn, bound = torch.empty(self.lora_A.shape), 1 / math.sqrt(self.in_features)
        if self.drawn == "gaussian":
            drawn.normal_(0.0, 1 / len(drawn), generator=generator)
        else:
            drawn.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(drawn)

    def forward(
        self, x: Tensor, dropout: Dropout | None = None, out: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        y = super().forward(x, dropout, out, residual)  # (..., out)
        if dropout is not None:
            A, B, *_ = self.tensors_in(x.dtype)
            dropped, _ = dropout.drop(x)
            return y.addmm_(dropped @ A.T, B.T, alpha=self.scaling)  # by way of (N, R)
        return self.updated(x, y)

    def updated(self, x: Tensor, y: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if not torch.is_autocast_enabled(x.device.type):
            dropped = dropped.to(self.lora_A.dtype)
        update = F.linear(F.linear(dropped, self.lora_A), self.lora_B)  # (..., R) -> (..., out)
        return self.switched(y + (update * self.scaling).to(y.dtype), y)

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
        dx, _ = super().gradients(grad, x, dropout, wants_input, out, add)
        A, B, *_ = self.tensors_in(grad.dtype)
        dropped, mask = dropout.drop(x)
        dB = scaled_product(grad.T, dropped @ A.T, self.scaling, self.lora_B.dtype)
        dt = scaled_product(grad, B, self.scaling)  # (N, R)
        trained = (scaled_product(dt.T, dropped, dtype=self.lora_A.dtype), dB) if self.trains_A else (dB,)
        if dx is not None:
            if mask is None:
                dx.addmm_(dt, A)
            else:
                dropout.add_gradient(dx, dt @ A, mask)
        return dx, trained

    @staticmethod
    def merged(W: Tensor, trained: Trained, scaling: float, rows: slice = slice(None)) -> Tensor:
        """W + scaling · B A."""
        A, B = trained
        return (B[rows].float() @ A.float()).mul_(scaling).add_(W.float())
