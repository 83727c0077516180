"""The pieces of a block's forward and backward passes, each with its gradient written out.

Frozen weights get no gradient, LoRA's intermediates are rank-wide, dropout is redrawn from its seed, norms are computed
a tile at a time, and rotation happens in place. Shapes as in ``transformer``: x (N, D) is a row of tokens, weights
(out, in), A (R, in), B (out, R).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model.compilable import compilable
from llamatune.model.lora import LoRALinear
from llamatune.model.quantization import NF4Weight
from llamatune.model.transformer import Linear, RMSNorm, Rotation, widened

TILE_TOKENS = 2048
"""Rows that are in flight at once where nothing of them is kept."""


@dataclass(frozen=True)
class Projection:
    """One linear layer as numbers: frozen ``weight``, and LoRA's part where it is adapted."""

    weight: Tensor | NF4Weight
    lora_A: Tensor | None  # noqa: N815 - the paper's and the layer's name
    lora_B: Tensor | None  # noqa: N815
    scaling: float
    dropout: float
    seed: int

    @staticmethod
    def of(layer: Linear) -> Projection:
        """Take a layer's weights, and draw the seed of its dropout."""
        weight = layer.weight if layer.quantized is None else layer.quantized
        assert isinstance(weight, Tensor | NF4Weight)
        if not isinstance(layer, LoRALinear):
            return Projection(weight, None, None, 0.0, 0.0, 0)
        dropout = layer.dropout if layer.training else 0.0
        # Drawn from the global generator, so it is a function of the window, and the same when a block is run again.
        seed = int(torch.randint(1 << 62, ())) if dropout else 0
        return Projection(weight, layer.lora_A, layer.lora_B, layer.scaling, dropout, seed)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W (out, in) in ``dtype``; a quantised one is unpacked into the shared buffer, so use it at once."""
        return self.weight.to(dtype) if isinstance(self.weight, Tensor) else self.weight.unpacked(dtype)

    @property
    def trained(self) -> tuple[Tensor | None, Tensor | None]:
        return self.lora_A, self.lora_B

    def keep(self, x: Tensor, first_row: int) -> Tensor | None:
        """Dropout's mask for rows ``first_row ...`` of the input, already divided by the share that is kept."""
        if not self.dropout:
            return None
        generator = torch.Generator(x.device).manual_seed(self.seed + first_row)
        kept = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
        return kept.div_(1 - self.dropout)


def project(x: Tensor, by: Projection, first_row: int = 0) -> Tensor:
    """x W^T + scaling · dropout(x) A^T B^T, in x's dtype."""
    y = x @ by.matrix(x.dtype).T
    if by.lora_A is not None and by.lora_B is not None:
        keep = by.keep(x, first_row)
        t = (x if keep is None else x * keep) @ by.lora_A.to(x.dtype).T  # (N, R)
        y.addmm_(t, by.lora_B.to(x.dtype).T, alpha=by.scaling)
    return y


def project_backward(
    grad: Tensor, x: Tensor | None, by: Projection, wants_input: bool = True, first_row: int = 0
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients with respect to x, A and B; ``x`` is needed only where the layer is adapted."""
    dx = grad @ by.matrix(grad.dtype) if wants_input else None
    if by.lora_A is None or by.lora_B is None or x is None:
        return dx, None, None
    A, B = by.lora_A.to(grad.dtype), by.lora_B.to(grad.dtype)
    keep = by.keep(x, first_row)
    dropped = x if keep is None else x * keep
    dB = (grad.T @ (dropped @ A.T)).to(by.lora_B.dtype).mul_(by.scaling)
    dt = (grad @ B).mul_(by.scaling)  # (N, R)
    dA = (dt.T @ dropped).to(by.lora_A.dtype)
    if dx is not None:
        if keep is None:
            dx.addmm_(dt, A)
        else:
            dx.add_((dt @ A).mul_(keep))
    return dx, dA, dB


def tiles(x: Tensor) -> tuple[Tensor, ...]:
    """Rows, so many at a time."""
    return torch.split(x, TILE_TOKENS)


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


def normalise_backward(grad: Tensor, x: Tensor, norm: RMSNorm) -> Tensor:
    """The gradient with respect to x, in x's dtype, from that with respect to the normed x."""
    out = torch.empty_like(x)
    for dh, tile, into in zip(tiles(grad), tiles(x), tiles(out), strict=True):
        _normalise_backward_into(into, dh, tile, norm.weight, norm.eps)
    return out


@compilable
def _normalise_backward_into(out: Tensor, grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    wide = widened(x)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit, dh = wide * scale, widened(grad) * widened(weight)
    out.copy_(scale * (dh - unit * (dh * unit).mean(-1, keepdim=True)))


def rotate_in_place(x: Tensor, rotation: Rotation, head_dim: int, back: bool = False) -> None:
    """Turn the pairs of x (N, heads · E) by their positions' angles, or back."""
    cos, sin = (part[0, 0] for part in rotation)  # (N, E)
    _rotate_in_place(x, cos, sin, head_dim, back)


@compilable
def _rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int, back: bool) -> None:
    cos, sin = (part[:, None, : head_dim // 2].to(x.dtype) for part in (cos, sin))  # (N, 1, E/2)
    first, second = x.view(len(x), -1, head_dim).chunk(2, dim=-1)
    if back:
        sin = -sin
    turned = first * cos - second * sin
    second.mul_(cos).add_(first * sin)
    first.copy_(turned)


@compilable
def swiglu_in_place(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, in gate's place."""
    return F.silu(gate, inplace=True).mul_(up)


@compilable
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of silu(gate) · up with respect to gate and to up; the latter in grad's place."""
    sigmoid = torch.sigmoid(gate)
    activated = gate * sigmoid
    # silu'(g) = sigmoid(g) + silu(g) (1 - sigmoid(g))
    slope = (1 - sigmoid).mul_(activated).add_(sigmoid)
    return slope.mul_(grad).mul_(up), grad.mul_(activated)
