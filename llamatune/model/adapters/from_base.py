"""LoRA that starts from the base: W x + s (B A - B0 A0) x with A = A0 and B = B0 at first, parts of W itself.

PiSSA (Meng et al. 2024) and OLoRA (Büyükakyüz 2024) subtract s B0 A0 from W, and train s B A beside the rest. Here W
stays as it is, in memory and on disk, and s B0 A0 is subtracted from what it computes: the same gradients, on a
quantised base too, and without W - s B0 A0 rounded to 16 bits. At every moment this is plain LoRA of twice the rank,
[A; A0] and [B, -B0], and so it is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamatune.errors import NumericsError, SpecError
from llamatune.model.adapters.adapted_linear import AdaptedLinear
from llamatune.model.adapters.lora import LoRALinear
from llamatune.model.layers import Dropout, Trained, product_dtype
from llamatune.model.products import scaled_product

_MOST_EXACT = 1024
"""Matrices of more rows and columns than that are decomposed by subspace iteration: an SVD would take minutes."""
_ITERATIONS, _MORE = 16, 8


class _WithoutStart(AdaptedLinear):
    """The frozen part: W x - s B0 A0 x."""

    initial_A: nn.Parameter  # noqa: N815
    initial_B: nn.Parameter  # noqa: N815

    def forward(
        self, x: Tensor, dropout: Dropout | None = None, out: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        y = super().forward(x, dropout, out, residual)
        if dropout is not None:
            *_, A, B = self.tensors_in(x.dtype)
            return y.addmm_(x @ A.T, B.T, alpha=-self.scaling)
        inner = x if torch.is_autocast_enabled(x.device.type) else x.to(self.initial_A.dtype)
        return y - (F.linear(F.linear(inner, self.initial_A), self.initial_B) * self.scaling).to(y.dtype)

    def gradients(
        self,
        grad: Tensor,
        x: Tensor | None,
        dropout: Dropout,
        wants_input: bool,
        out: Tensor | None = None,
        add: bool = False,
    ) -> tuple[Tensor | None, Trained]:
        dx, trained = super().gradients(grad, x, dropout, wants_input, out, add)
        if dx is not None:
            *_, A, B = self.tensors_in(grad.dtype)
            dx.addmm_(scaled_product(grad, B, -self.scaling), A)
        return dx, trained


class LoRAFromBaseLinear(LoRALinear, _WithoutStart):
    """A frozen matrix without a part of it, and that part, which is trained."""

    @torch.no_grad()
    def start(self, generator: torch.Generator) -> None:
        """A and B, as they are and as they stay, from W; computed in fp32 or wider."""
        r = len(self.lora_A)
        if r > min(self.in_features, self.out_features):
            what = f"rank {r} of a matrix of {self.out_features} x {self.in_features}"
            raise SpecError(what, "lora.r", "parts of the base have no more ranks than it; lower it, or lora.ranks")
        W = self.matrix(product_dtype(self.lora_A)).to(self.lora_A.dtype)
        if not W.isfinite().all():
            raise NumericsError("the base holds NaN or infinity", "lora.init", "start with kaiming")
        with torch.autocast(W.device.type, enabled=False):
            A, B = self.parts_of(W, r, generator)
        for into, values in zip(self.tensors, (A, B, A, B), strict=True):
            into.copy_(values)

    def parts_of(self, W: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of a matrix (out, in)."""
        raise NotImplementedError

    @staticmethod
    def stored(tensors: Trained) -> Trained:
        A, B, initial_A, initial_B = tensors
        return torch.cat((A, initial_A)), torch.cat((B, -initial_B), dim=1)

    @staticmethod
    def restored(stored: Trained) -> Trained:
        A, B = stored
        r = len(A) // 2
        return A[:r], B[:, :r], A[r:], -B[:, r:]


class PiSSALinear(LoRAFromBaseLinear):
    """The largest singular values, their roots in A and in B."""

    def parts_of(self, W: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if min(W.shape) <= _MOST_EXACT:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, Vh = _largest_singular(W, min(r + _MORE, *W.shape), generator)
        roots = (S[:r] / self.scaling).sqrt()
        return roots[:, None] * Vh[:r], U[:, :r] * roots


class OLoRALinear(LoRAFromBaseLinear):
    """The first columns of Q and rows of R of W = Q R."""

    def parts_of(self, W: Tensor, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        Q = torch.linalg.qr(W[:, :r])[0]  # its first columns depend on those of W alone
        return Q.T @ W, Q


def _largest_singular(W: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vh of the ``count`` largest singular values by subspace iteration (Halko et al. 2011, algorithm 4.4)."""
    drawn = torch.randn(W.shape[1], count, generator=generator, dtype=W.dtype).to(W.device)
    Q = torch.linalg.qr(W @ drawn)[0]
    for _ in range(_ITERATIONS):
        Q = torch.linalg.qr(W @ torch.linalg.qr(W.T @ Q)[0])[0]
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, Vh
