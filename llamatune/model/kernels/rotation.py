"""Rotation of queries and keys by their positions' angles (RoPE), both in one launch, forward and back, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn(x, x_head, out, out_head, c, s, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Turn the heads of one position: ``x`` and ``out`` point to its first, and heads lie so many elements apart."""
    pair, head = tl.arange(0, HALF)[None, :], tl.arange(0, HEADS)[:, None]
    inside = (pair < half) & (head < heads)
    first = tl.load(x + head * x_head + pair, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + head * x_head + half + pair, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + head * out_head + pair, first * c - second * s, mask=inside)
    tl.store(out + head * out_head + half + pair, second * c + first * s, mask=inside)


@triton.jit
def _rotation(
    q, k, q_out, k_out, cos, sin, positions, q_heads, k_heads, half,
    q_batch, q_head, q_position, k_batch, k_head, k_position,
    qo_batch, qo_head, qo_position, ko_batch, ko_head, ko_position,
    angle_batch, angle_position,
    BACK: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A program turns all heads of q, or of k, at one position."""
    at = tl.program_id(0).to(tl.int64)
    batch, position = at // positions, at % positions
    pair = tl.arange(0, HALF)[None, :]
    angles = batch * angle_batch + position * angle_position + pair
    c = tl.load(cos + angles, mask=pair < half, other=0.0)
    s = tl.load(sin + angles, mask=pair < half, other=0.0)
    if BACK:
        s = -s
    if tl.program_id(1) == 0:
        x, out = q + batch * q_batch + position * q_position, q_out + batch * qo_batch + position * qo_position
        _turn(x, q_head, out, qo_head, c, s, q_heads, half, Q_HEADS, HALF)
    else:
        x, out = k + batch * k_batch + position * k_position, k_out + batch * ko_batch + position * ko_position
        _turn(x, k_head, out, ko_head, c, s, k_heads, half, K_HEADS, HALF)


def _launch(parts: Sequence[tuple[Tensor, Tensor]], cos: Tensor, sin: Tensor, back: bool) -> None:
    """Turn one or two tensors (B, heads, T, E) into others of their shapes, which may be they themselves."""
    (q, q_out), (k, k_out) = parts[0], parts[-1]
    B, H, T, E = q.shape
    assert all(x.stride(3) == 1 for x in (q, k, q_out, k_out, cos)), "the elements of a head lie together"
    assert cos.stride() == sin.stride()
    if B * T == 0:
        return
    strides = [stride for x in (q, k, q_out, k_out) for stride in x.stride()[:3]]
    _rotation[(B * T, len(parts))](
        q, k, q_out, k_out, cos, sin, T, H, k.shape[1], E // 2, *strides,
        cos.stride(0) if len(cos) > 1 else 0, cos.stride(2),
        BACK=back, Q_HEADS=triton.next_power_of_2(H), K_HEADS=triton.next_power_of_2(k.shape[1]),
        HALF=triton.next_power_of_2(E // 2),
    )  # fmt: skip


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, H, T, E) and k (B, K, T, E), each pair turned by its position's angle."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    _launch([(q, q_out), (k, k_out)], cos, sin, False)
    return q_out, k_out


def _in_heads(x: Tensor, cos: Tensor) -> Tensor:
    """(1, heads, N, E) of (N, heads · E)."""
    return x.view(1, len(x), -1, cos.shape[-1]).transpose(1, 2)


def rotate_in_place(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the pairs of q (N, H · E) and k (N, K · E)."""
    q, k = _in_heads(q, cos), _in_heads(k, cos)
    _launch([(q, q), (k, k)], cos, sin, False)


def rotate_back(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A gradient (N, heads · E) turned back, in a new tensor."""
    turned = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    _launch([(_in_heads(grad, cos), _in_heads(turned, cos))], cos, sin, True)
    return turned
