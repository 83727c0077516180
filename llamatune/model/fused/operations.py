"""Operations of the fused block: products with dropout, RMSNorm, rotation, SwiGLU, each forward and backward.

Nothing here is followed by autograd. Shapes as in ``transformer``: x (N, D) is a row of tokens, weights (out, in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamatune.model.compiled_functions import compilable
from llamatune.model.kernels.choice import by_kernel
from llamatune.model.layers import Dropout, Linear, RMSNorm, Trained, widened
from llamatune.shapes import tile_sizes


@dataclass(frozen=True)
class Projection:
    """A linear layer and the dropout of its input in one pass: run again, it drops the same."""

    layer: Linear
    dropout: Dropout

    def __call__(self, x: Tensor, first_row: int = 0) -> Tensor:
        """The layer's output for rows that begin at ``first_row``, (N, in) -> (N, out), in x's dtype."""
        return self.layer(x, replace(self.dropout, first_row=first_row))  # type: ignore[no-any-return]

    def gradients(
        self, grad: Tensor, x: Tensor | None, wants_input: bool = True, first_row: int = 0
    ) -> tuple[Tensor | None, Trained]:
        """Gradients with respect to x and to the trained tensors; ``x`` is needed only where the layer is adapted."""
        return self.layer.gradients(grad, x, replace(self.dropout, first_row=first_row), wants_input)


def projections(half: nn.Module) -> tuple[Projection, ...]:
    """The linear layers of a half, their dropout drawn: whoever runs them again drops the same."""
    return tuple(Projection(layer, layer.draw_dropout()) for layer in half.children() if isinstance(layer, Linear))


def trained_by(parts: Sequence[Projection]) -> list[Tensor]:
    """The trained tensors of several layers, one layer after another."""
    return [tensor for part in parts for tensor in part.layer.trained]


def tiles(x: Tensor) -> tuple[Tensor, ...]:
    """The rows of x, ``TILE_TOKENS`` at a time."""
    return torch.split(x, tile_sizes.TILE_TOKENS)


@by_kernel("rms_norm")
def normalise(x: Tensor, norm: RMSNorm, dtype: torch.dtype) -> Tensor:
    """RMSNorm of x in ``dtype``, as the module computes it, a tile at a time: only a tile is ever in fp32."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for tile, into in zip(tiles(x), tiles(out), strict=True):
        _normalise_into(into, tile, norm.weight, norm.eps)
    return out


@compilable
def _normalise_into(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    wide = widened(x)
    out.copy_(wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * widened(weight))


@by_kernel("rms_norm")
def normalise_backward(
    grad: Tensor, x: Tensor, norm: RMSNorm, beside: Tensor | None = None, into: Tensor | None = None
) -> Tensor:
    """The gradient with respect to x, in x's dtype, from that with respect to the normed x.

    ``beside``, the gradient of the residual stream, is added before the rounding. The result is written ``into`` a
    tensor, which may be one of the others, or a new one.
    """
    out = torch.empty_like(x) if into is None else into
    parts = [grad, x, out] if beside is None else [grad, x, out, beside]
    for dh, tile, into_tile, *more in zip(*map(tiles, parts), strict=True):
        _normalise_backward_into(into_tile, dh, tile, norm.weight, norm.eps, *more)
    return out


@compilable
def _normalise_backward_into(
    out: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float, beside: Tensor | None = None
) -> None:
    wide = widened(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit, dh = wide * scale, widened(grad) * widened(weight)
    dx = scale * (dh - unit * (dh * unit).mean(-1, keepdim=True))
    out.copy_(dx if beside is None else dx + beside)


@by_kernel("rotation")
def rotate_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the pairs of q (N, H · E) and k (N, K · E) by their positions' angles (1, 1, N, E)."""
    _turn(q, cos, sin)
    _turn(k, cos, sin)


@by_kernel("rotation")
def rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A gradient (N, heads · E) turned back, in a new tensor: autograd owns ``grad``."""
    turned = grad.clone(memory_format=torch.contiguous_format)
    _turn(turned, cos, sin, True)
    return turned


@compilable
def _turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> None:
    head_dim = cos.shape[-1]
    cos, sin = (part[0, 0, :, None, : head_dim // 2].to(x.dtype) for part in (cos, sin))  # (N, 1, E/2)
    first, second = x.view(len(x), -1, head_dim).chunk(2, dim=-1)
    if back:
        sin = -sin
    turned = first * cos - second * sin
    second.mul_(cos).add_(first * sin)
    first.copy_(turned)


@by_kernel("swiglu")
@compilable
def swiglu_in_place(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, in gate's place."""
    return F.silu(gate, inplace=True).mul_(up)


@by_kernel("swiglu")
@compilable
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of silu(gate) · up with respect to gate and to up; the latter in grad's place."""
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid
    # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
    slope = (1 - sigmoid).mul_(activated).add_(sigmoid)
    return slope.mul_(grad).mul_(up), grad.mul_(activated)
