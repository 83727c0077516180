"""Operations of the fused block: products with dropout, RMSNorm, rotation, SwiGLU, each forward and backward.

Nothing here is followed by autograd. Shapes as in ``transformer``: x (N, D) is a row of tokens, weights (out, in).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamatune.model.compiled_functions import compilable
from llamatune.model.kernels.choice import by_kernel
from llamatune.model.layers import Dropout, Linear, RMSNorm, Trained, widened
from llamatune.model.products import at_once
from llamatune.shapes import tile_sizes


@dataclass(frozen=True)
class Projection:
    """A linear layer and the dropout of its input in one pass: run again, it drops the same."""

    layer: Linear
    dropout: Dropout

    def __call__(
        self, x: Tensor, first_row: int = 0, out: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The layer's output for rows that begin at ``first_row``, (N, in) -> (N, out), in x's dtype.

        With ``residual`` it is added to that, in the residual's dtype. ``out`` is where to write what is returned.
        """
        dropout = replace(self.dropout, first_row=first_row)
        if residual is None or (at_once(x) and residual.dtype == x.dtype):
            return self.layer(x, dropout, out, residual)  # type: ignore[no-any-return]
        return torch.add(residual, self.layer(x, dropout), out=out)

    def gradients(
        self,
        grad: Tensor,
        x: Tensor | None,
        wants_input: bool = True,
        first_row: int = 0,
        out: Tensor | None = None,
        add: bool = False,
    ) -> tuple[Tensor | None, Trained]:
        """Gradients with respect to x and to the trained tensors; ``x`` is needed only where the layer is adapted.

        The former is written to ``out`` if that is given, or added to what is there.
        """
        dropout = replace(self.dropout, first_row=first_row)
        if not add or at_once(grad):
            return self.layer.gradients(grad, x, dropout, wants_input, out, add)
        dx, trained = self.layer.gradients(grad, x, dropout, wants_input)
        return None if dx is None or out is None else out.add_(dx), trained

    def by_tiles(self, x: Tensor, first_row: int, out: Tensor | None = None) -> Tensor:
        """The layer's output, a tile of rows at a time."""
        out = x.new_empty(len(x), self.layer.out_features) if out is None else out
        for row, tile, into in tiles(first_row, x, out):
            self(tile, row, into)
        return out

    def gradients_by_tiles(self, grad: Tensor, x: Tensor | None, first_row: int, out: Tensor, add: bool) -> Trained:
        """The trained tensors' gradients; that with respect to x is written to ``out``, or added to what is there."""
        total: Trained = ()
        for row, dy, into, *tile in tiles(first_row, grad, out, *(() if x is None else (x,))):
            _, trained = self.gradients(dy, tile[0] if tile else None, True, row, into, add)
            total = added(total, trained)
        return total


def projections(half: nn.Module) -> tuple[Projection, ...]:
    """The linear layers of a half, their dropout drawn: whoever runs them again drops the same."""
    return tuple(Projection(layer, layer.draw_dropout()) for layer in half.children() if isinstance(layer, Linear))


def trained_by(parts: Sequence[Projection]) -> list[Tensor]:
    """The trained tensors of several layers, one layer after another."""
    return [tensor for part in parts for tensor in part.layer.trained]


def added(total: Trained, addends: Trained) -> Trained:
    """The sums, written to ``total``; the addends where it is empty."""
    for before, addend in zip(total, addends, strict=bool(total)):
        before.add_(addend)
    return total or addends


def tiles(first_row: int, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Tiles of ``TILE_TOKENS`` rows: the number of the first row, counted from ``first_row``, and the tensors' rows."""
    size = tile_sizes.TILE_TOKENS
    for start in range(0, len(tensors[0]), size):
        yield first_row + start, *(x[start : start + size] for x in tensors)


@by_kernel("rms_norm")
def normalise(x: Tensor, norm: RMSNorm, dtype: torch.dtype) -> Tensor:
    """RMSNorm of x in ``dtype``, as the module computes it, a tile at a time: only a tile is ever in fp32.

    A row of x holds what is normalised together, or several heads side by side.
    """
    out, width = torch.empty(x.shape, dtype=dtype, device=x.device), len(norm.weight)
    for _, *parts in tiles(0, out, x):
        into, tile = (part.view(-1, width) for part in parts)
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

    ``beside``, the gradient of the residual stream in x's dtype, is added. The result is written ``into`` a tensor,
    which may be one of the others, or a new one.
    """
    out, width = torch.empty_like(x) if into is None else into, len(norm.weight)
    for _, *parts in tiles(0, out, grad, x, *(() if beside is None else (beside,))):
        into_tile, dh, tile, *more = (part.view(-1, width) for part in parts)
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
    out.copy_(dx if beside is None else dx.to(beside.dtype) + beside)  # each rounded, as autograd adds them


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
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """Gradients of silu(gate) · up with respect to gate and to up, in their places."""
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid
    # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
    slope = (1 - sigmoid).mul_(activated).add_(sigmoid)
    torch.mul(slope.mul_(grad), up, out=gate)
    torch.mul(grad, activated, out=up)
