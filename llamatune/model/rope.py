"""Rotary position embeddings (RoPE, Su et al. 2021): angles, and the rotation of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatune.model.compiled_functions import compilable
from llamatune.model.kernels.choice import by_kernel

Rotation = tuple[Tensor, Tensor]
"""cos and sin of the rotary angles, each (B or 1, 1, T, E), fp32."""


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Rotation:
    """cos and sin for ``positions`` (B or 1, T), each (B or 1, 1, T, E) in fp32 (Su et al. 2021, eq. 34).

    The two halves of a head hold the pairs' first and second members (rotate-half, Hugging Face's layout).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents  # (E/2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, E/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, E)
    return angles.cos(), angles.sin()


@by_kernel("rotation")
@compilable
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each pair of q (B, H, T, E) and k (B, K, T, E) by its position's angle, in their dtype."""
    return _turned(q, cos, sin), _turned(k, cos, sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
