"""The bytes of ``model.lean``, moment by moment in the order of their lines."""

from __future__ import annotations

from llamatune.memory.sizes import Part, Sizes
from llamatune.shapes.config import ATTENTION_MODULES, FEED_FORWARD_MODULES
from llamatune.shapes.limits import TILE_TOKENS

_INPUTS = ("q_proj", "k_proj", "v_proj")


def _lora(z: Sizes, name: str, rows: int, back: bool) -> int:
    """What LoRA's part of a product has in flight: casts, rank-wide tensors, and with dropout the mask and the rest."""
    if name not in z.targets:
        return 0
    out, in_ = z.config.linear_shape(name)
    casts = z.R * (out + in_) * z.c if z.c < 4 else 0
    thin, wide = rows * z.R * z.c, rows * in_ * z.c if z.dropout else 0
    if back:
        return casts + z.R * (out + in_) * 4 + 2 * thin + 3 * wide
    return max(casts + thin, 2 * wide)


def _product(z: Sizes, name: str, rows: int, back: bool = False) -> int:
    """A product, or its gradient with respect to the input, and what is in flight with it."""
    width = z.config.linear_shape(name)[1 if back else 0]
    return rows * width * z.c + max(z.matrix(name), _lora(z, name, rows, back))


def _norm(z: Sizes, rows: int, back: bool = False) -> int:
    """The fp32 tiles of a norm."""
    tiles = 4 if back else 2
    return (tiles + 1 if z.s < 4 else tiles) * 4 * min(rows, TILE_TOKENS) * z.D


def attention(z: Sizes, recompute: bool, last: bool) -> Part:
    """Norm, q, k, v, rotation, attention, o and the residual addition; the last block goes on with P rows."""
    N, n, D, Q, K, c, s = z.N, z.P if last else z.N, z.D, z.Q, z.K, z.c, z.s
    made, x, h, qkv = z.attention(), N * D * s, N * D * c, N * (Q + 2 * K) * c
    turning = N * Q * c * 3 // 2
    entering = h + max(
        _norm(z, N),
        _product(z, "q_proj", N),
        N * Q * c + _product(z, "k_proj", N),
        N * (Q + K) * c + _product(z, "v_proj", N),
        qkv + turning,
    )
    chosen = n * Q * c if last else 0
    outputs = made.outputs + (chosen or made.flat)
    kept = x + outputs + (0 if recompute else made.inputs)
    forward = max(
        x + entering,
        x + qkv + made.forward,
        kept + _product(z, "o_proj", n),
        kept + n * D * (c + s) + (n * D * s if last else 0),
    )
    dx, do = n * D * s + (x if last else 0), N * Q * c + chosen
    lora = max(_lora(z, name, N, back=True) for name in _INPUTS)
    h = h if z.targets & set(_INPUTS) else 0
    backward = max(
        dx + (n * D * c if s != c else 0) + _product(z, "o_proj", n, back=True),
        n * D * s + n * Q * c + max(entering, qkv + made.forward) if recompute else 0,
        dx + do + made.backward + (made.inputs if recompute else 0),
        # q, k, v and the outputs are gone when their gradients go on to the norm.
        dx + qkv + h - (kept - x) + N * Q * c + max(turning, N * D * c + max(lora, z.matrix("q_proj"))),
        dx + qkv + h - (kept - x) + N * D * (c + s) + _norm(z, N, back=True),
    )
    return Part(kept, forward, backward, z.gradients(ATTENTION_MODULES))


def _tile(z: Sizes, n: int, recompute: bool) -> tuple[int, int]:
    """One tile of the feed-forward half: forward, and backward as far as the gradient of the normed input."""
    T, c = min(n, TILE_TOKENS), z.c
    narrow, wide = T * z.D * c, T * z.F * c
    forward = narrow + max(
        _norm(z, n),
        _product(z, "gate_proj", T),
        wide + _product(z, "up_proj", T),
        2 * wide + _product(z, "down_proj", T),
    )
    needs_input = recompute or bool(z.targets & {"gate_proj", "up_proj"})
    again = (narrow if needs_input else 0) + (2 * wide if recompute else 0)
    lora = max(_lora(z, name, T, back=True) for name in ("gate_proj", "up_proj"))
    backward = max(
        (wide if "down_proj" in z.targets else 0) + _product(z, "down_proj", T, back=True),
        4 * wide,  # the gradient, sigmoid and silu of gate, and the slope of silu
        2 * wide + 2 * narrow + max(lora, z.matrix("up_proj")),
    )
    return forward, (narrow if z.s != c else 0) + again + backward


def feed_forward(z: Sizes, recompute: bool, last: bool) -> Part:
    """Norm, gate, up, SiLU, product, down and the residual addition."""
    n, D, c, s = z.P if last else z.N, z.D, z.c, z.s
    x, T = n * D * s, min(n, TILE_TOKENS)
    kept = x + (0 if recompute else 2 * n * z.F * c)
    forward, backward = _tile(z, n, recompute)
    joined = n * D * c if n > T else 0
    return Part(
        kept,
        kept + max((n - T) * D * c + forward, n * D * c + joined, n * D * (c + s)),
        2 * x + max(backward, T * D * (c + s) + _norm(z, n, back=True), x),
        z.gradients(FEED_FORWARD_MODULES),
    )


def block(z: Sizes, last: bool) -> Part:
    """Both halves of which only the block's input is kept."""
    n = z.P if last else z.N
    first, second = attention(z, False, last), feed_forward(z, True, last)
    x, middle = z.N * z.D * z.s, n * z.D * z.s
    backward = max(
        middle + first.forward - x,
        first.kept - x + middle + second.backward,
        first.kept - x + 2 * middle + first.backward,
    )
    forward = max(first.forward, x + middle + _tile(z, n, recompute=True)[0])
    return Part(x, forward, backward, first.gradients + second.gradients)
