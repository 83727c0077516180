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
from llamatune.model.products import at_once, few_rows_linear, product, product_back, suits_few_rows
from llamatune.shapes.llama_config import LlamaConfig

_NORMED_IN_ONE_CALL = 1 << 14
"""Numbers through a norm whose temporaries stay in a core's cache."""
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, any_layout: bool = False) -> Tensor:
    """x W^T + bias; outside autocast the input's dtype decides in which precision the product is computed.

    In ``any_layout`` it may lie in memory column after column.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        is_few = suits_few_rows(x, weight, any_layout)
        return few_rows_linear(x, weight, bias, any_layout) if is_few else F.linear(x, weight, bias)
    y: Tensor = FrozenProduct.apply(  # type: ignore[no-untyped-call]
        x, lambda x: F.linear(x, weight.to(x.dtype)), lambda grad: grad @ weight.to(grad.dtype)
    )
    return y if bias is None else y.add_(bias)


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

    def drop(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``x`` with elements dropped and the others scaled by 1 / (1 - p), and the mask; without dropout x, None."""
        if not self.p:
            return x, None
        generator = torch.Generator(x.device).manual_seed(self.seed + self.first_row)
        if at_once(x):
            return torch._fused_dropout(x, 1 - self.p, generator)  # the mask is of zeros and ones, in bytes
        mask = torch.empty_like(x).bernoulli_(1 - self.p, generator=generator).div_(1 - self.p)
        return x * mask, mask

    def add_gradient(self, dx: Tensor, grad: Tensor, mask: Tensor) -> None:
        """Add to ``dx`` the gradient with respect to x, from ``grad``, that with respect to what ``drop`` made of x."""
        if at_once(dx):
            dx.addcmul_(grad, mask, value=1 / (1 - self.p))
        else:
            dx.add_(grad.mul_(mask))


class QuantizedWeight(Protocol):
    """A frozen matrix in a packed form; calling it gives x W^T."""

    shape: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor: ...

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in ``dtype`` inside a shared buffer: use it at once, the next call overwrites it."""

    def product(self, x: Tensor, out: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        """x W^T in x's dtype, without autograd; ``out`` and ``added`` as of ``products.product``, for rows."""

    def product_back(self, grad: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
        """grad W in grad's dtype, without autograd; ``out`` and ``add`` as of ``products.product_back``, for rows."""


class Linear(nn.Linear):
    """A matrix and, in some models, a bias, (..., in) -> (..., out).

    ``quantized``, if it is not None, computes the product; ``weight`` is then None. A bias is never quantised.
    """

    trained: Trained = ()
    any_layout = False
    """Whether the output may lie in memory column after column."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.quantized: QuantizedWeight | None = None

    def reset_parameters(self) -> None:
        """Nothing, as in ``Embedding``."""

    @classmethod
    def of(cls, config: LlamaConfig, module: str) -> Linear:
        """One of the seven linear layers of a block."""
        out_features, in_features = config.linear_shape(module)
        return cls(in_features, out_features, module in config.biased_modules)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in ``dtype``; a quantised one lies in a shared buffer, so use it at once."""
        return self.weight.to(dtype) if self.quantized is None else self.quantized.unpacked(dtype)

    def forward(
        self, x: Tensor, dropout: Dropout | None = None, out: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """x W^T + bias; with ``dropout``, which a frozen layer has none of, in x's dtype and without autograd.

        Then it is written to ``out`` and added to ``residual``, of x's dtype too, if they are given.
        """
        if dropout is not None:
            return self._product(x, out, residual)
        if self.quantized is None:
            return linear(x, self.weight, self.bias, self.any_layout)
        y = self.quantized(x)
        return y if self.bias is None else y.add_(self.bias)

    def _product(self, x: Tensor, out: Tensor | None, residual: Tensor | None) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        added = bias if residual is None else residual
        if self.quantized is None:
            y = product(x, self.matrix(x.dtype).T, out, added)
        else:
            y = self.quantized.product(x, out, added)
        return y if bias is None or residual is None else y.add_(bias)

    def updated(self, x: Tensor, y: Tensor) -> Tensor:
        """The output for ``x``, from that of the frozen matrix and bias, ``y``."""
        return y

    def draw_dropout(self) -> Dropout:
        """The dropout of one pass."""
        return Dropout()

    def gradients(
        self,
        grad: Tensor,
        x: Tensor | None,
        dropout: Dropout,
        wants_input: bool,
        out: Tensor | None = None,
        add: bool = False,
    ) -> tuple[Tensor | None, Trained]:
        """Gradients with respect to x, if wanted, and to ``trained``; only an adapted layer needs ``x``.

        The former is written to ``out`` if that is given, or added to what is there.
        """
        if not wants_input:
            return None, ()
        if self.quantized is not None:
            return self.quantized.product_back(grad, out, add), ()
        return product_back(grad, self.matrix(grad.dtype), out, add), ()


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
    is_few = x.is_cpu and x.numel() <= _NORMED_IN_ONE_CALL and x.dtype == weight.dtype
    if torch.is_inference_mode_enabled() and is_few:
        return F.rms_norm(x, weight.shape, weight, eps)  # the same bits by fewer calls, with more temporaries
    wide = widened(x)
    if wide is not x and torch.is_inference_mode_enabled():
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        return wide.mul_(scale).mul_(weight).to(x.dtype)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * widened(weight)).to(x.dtype)


@by_kernel("swiglu")
@compilable
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up; in inference mode it overwrites ``gate``."""
    if torch.is_inference_mode_enabled():
        return F.silu(gate, inplace=True).mul_(up)
    return F.silu(gate) * up
