"""Rotary position embeddings (RoPE, Su et al. 2021): angles, and the rotation of queries and keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llamatune.model.compiled_functions import compilable
from llamatune.model.kernels.choice import by_kernel
from llamatune.shapes.rope_scaling import DynamicScaling, LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

Rotation = tuple[Tensor, Tensor]
"""cos and sin of the rotary angles, each (B or 1, 1, T, E), fp32."""


def rotary_angles(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None, lengths: Tensor | None = None
) -> Rotation:
    """cos and sin for ``positions`` (B or 1, T), each (B or 1, 1, T, E) in fp32 (Su et al. 2021, eq. 34).

    The two halves of a head hold the pairs' first and second members (rotate-half, Hugging Face's layout). ``lengths``
    (B or 1, T) are those of each position's sample, for scaling that depends on them; None: each row is one sample.
    """
    if isinstance(scaling, DynamicScaling):
        reached = positions.amax(1, keepdim=True) + 1 if lengths is None else lengths
        frequencies = _dynamic_frequencies(reached, head_dim, theta, scaling)[:, None]  # (B, 1, T or 1, E/2)
    else:
        frequencies = _frequencies(positions.device, head_dim, theta, scaling)  # (E/2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, E/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, E)
    cos, sin = angles.cos(), angles.sin()
    if isinstance(scaling, YarnScaling):
        return cos * scaling.attention_scale, sin * scaling.attention_scale
    return cos, sin


def _exponents(device: torch.device, head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim


def _frequencies(device: torch.device, head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians a token of each pair, (E/2,)."""
    frequencies: Tensor = 1.0 / theta ** _exponents(device, head_dim)
    match scaling:
        case LinearScaling():
            return frequencies / scaling.factor
        case Llama3Scaling():
            return _llama3_frequencies(frequencies, scaling)
        case YarnScaling():
            low, high = scaling.ramp(head_dim, theta)
            pairs = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
            stretched = ((pairs - low) / (high - low)).clamp(0, 1)
            return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)
    return frequencies


def _dynamic_frequencies(lengths: Tensor, head_dim: int, theta: float, scaling: DynamicScaling) -> Tensor:
    """Those of samples of ``lengths`` (...), (..., E/2)."""
    growth = scaling.factor * lengths.clamp(min=scaling.context) / scaling.context - (scaling.factor - 1)
    bases = theta * growth ** (head_dim / (head_dim - 2))
    return 1.0 / bases[..., None] ** _exponents(lengths.device, head_dim)


def _llama3_frequencies(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the original context
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


@by_kernel("rotation")
@compilable
def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each pair of q (B, H, T, E) and k (B, K, T, E) by its position's angle, in their dtype."""
    return rotate_alike(q, cos, sin), rotate_alike(k, cos, sin)


def rotate_alike(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``rotate``, of heads (B, any, T, E), in plain torch."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    if torch.is_inference_mode_enabled():
        return (x * cos).add_(torch.cat((-second, first), dim=-1).mul_(sin))
    return x * cos + torch.cat((-second, first), dim=-1) * sin
