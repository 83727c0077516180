"""Layers of a LLaMA block: embedding, linear layer, RMSNorm and SwiGLU.

A linear layer computes in two ways: by autograd, as ``layer(x)``, and inside the hand-written functions of a fused
block, as ``layer(x, dropout)`` with ``layer.gradients(...)``. Both enter by ``__call__``, so hooks see both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llamatune.model.compiled_functions import compilable
from llamatune.model.kernels.choice import by_kernel
from llamatune.shapes.llama_config import LlamaConfig

Trained = tuple[Tensor, ...]
"""The trained tensors of one linear layer, or their gradients. What each means, only its kind of adapter knows."""


def widened(x: Tensor) -> Tensor:
    """A 16-bit tensor in fp32; wider ones as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def product_dtype(x: Tensor) -> torch.dtype:
    """What products with ``x`` are computed in: autocast's dtype, or x's own outside autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class FrozenProduct(torch.autograd.Function):
    """x W^T in x's dtype by ``product``, and the gradient with respect to x by ``product_back``; no other is made.

    Each of the two casts or unpacks W for itself, so there is one such matrix at a time, and none is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: Callable[[Tensor], Tensor], product_back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.product_back = product_back
        return product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grad_outputs
        return ctx.product_back(grad), None, None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T; outside autocast the input's dtype decides in which precision the product is computed."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight)
    return FrozenProduct.apply(  # type: ignore[no-any-return, no-untyped-call]
        x, lambda x: F.linear(x, weight.to(x.dtype)), lambda grad: grad @ weight.to(grad.dtype)
    )


class Embedding(nn.Embedding):
    """A row for each token id, (...) -> (..., D)."""

    def reset_parameters(self) -> None:
        """Nothing: weights are read, or drawn by ``initialise``."""


@dataclass(frozen=True)
class Dropout:
    """The dropout of one layer's input in one pass: the same mask whenever it is made again.

    ``first_row`` is the place of the input's first row among all rows of the pass.
    """

    p: float = 0.0
    seed: int = 0
    first_row: int = 0

    @staticmethod
    def drawn(p: float) -> Dropout:
        """Draw the seed from the global generator, so that it is a function of the accumulation window."""
        return Dropout(p, int(torch.randint(1 << 62, ())) if p else 0)

    def mask(self, x: Tensor) -> Tensor | None:
        """1 / (1 - p) where an element of ``x`` is kept and 0 elsewhere, in x's dtype; None without dropout."""
        if not self.p:
            return None
        generator = torch.Generator(x.device).manual_seed(self.seed + self.first_row)
        kept = torch.empty_like(x).bernoulli_(1 - self.p, generator=generator)
        return kept.div_(1 - self.p)


class QuantizedWeight(Protocol):
    """A frozen matrix in a packed form; calling it gives x W^T."""

    shape: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor: ...

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in ``dtype`` inside a shared buffer: use it at once, the next call overwrites it."""

    def product(self, x: Tensor) -> Tensor:
        """x W^T in x's dtype, without autograd."""

    def product_back(self, grad: Tensor) -> Tensor:
        """grad W in grad's dtype, without autograd."""


class Linear(nn.Linear):
    """A matrix without bias (LLaMA has none), (..., in) -> (..., out).

    ``quantized``, if it is not None, computes the product; ``weight`` is then None.
    """

    trained: Trained = ()

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.quantized: QuantizedWeight | None = None

    def reset_parameters(self) -> None:
        """Nothing, as in ``Embedding``."""

    @classmethod
    def of(cls, config: LlamaConfig, module: str) -> Linear:
        """One of the seven linear layers of a block."""
        out_features, in_features = config.linear_shape(module)
        return cls(in_features, out_features)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in ``dtype``; a quantised one lies in a shared buffer, so use it at once."""
        return self.weight.to(dtype) if self.quantized is None else self.quantized.unpacked(dtype)

    def forward(self, x: Tensor, dropout: Dropout | None = None) -> Tensor:
        """x W^T; with ``dropout``, which a frozen layer has none of, in x's dtype and without autograd."""
        if dropout is not None:
            return x @ self.matrix(x.dtype).T if self.quantized is None else self.quantized.product(x)
        return linear(x, self.weight) if self.quantized is None else self.quantized(x)

    def draw_dropout(self) -> Dropout:
        """The dropout of one pass."""
        return Dropout()

    def gradients(
        self, grad: Tensor, x: Tensor | None, dropout: Dropout, wants_input: bool
    ) -> tuple[Tensor | None, Trained]:
        """Gradients with respect to x, if wanted, and to ``trained``; only an adapted layer needs ``x``."""
        if not wants_input:
            return None, ()
        return grad @ self.matrix(grad.dtype) if self.quantized is None else self.quantized.product_back(grad), ()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32 or wider (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@by_kernel("rms_norm")
@compilable
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, in x's dtype."""
    wide = widened(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * widened(weight)).to(x.dtype)


@by_kernel("swiglu")
@compilable
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate) * up
