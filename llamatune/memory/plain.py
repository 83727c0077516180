"""The bytes of ``model.transformer``'s modules as autograd keeps and frees them."""

from __future__ import annotations

from collections.abc import Sequence

from llamatune.memory.sizes import Part, Sizes
from llamatune.shapes.config import ATTENTION_MODULES, FEED_FORWARD_MODULES

_INPUTS, _OPENING = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def _linear(z: Sizes, name: str, rows: int, item_bytes: int, leads_back: bool = True) -> int:
    """What is kept of a linear layer beside its input as it is: casts of both, and LoRA's own.

    ``leads_back``: the input needs a gradient, as all but the first frozen block's does.
    """
    out, in_ = z.config.linear_shape(name)
    narrowed = z.autocast and item_bytes != z.c
    kept = rows * in_ * z.c if z.trains_all and narrowed else 0
    if z.autocast and z.casts and not z.nf4 and (z.trains_all or leads_back):
        kept += out * in_ * z.c
    if name in z.targets:
        kept += rows * z.R * z.c + (z.R * (out + in_) * z.c if z.c < 4 else 0)
        if z.dropout and leads_back:
            kept += rows * in_ * (1 if z.cuda else item_bytes)  # the mask
        if z.dropout or narrowed:
            kept += rows * in_ * (z.c if z.autocast else 4)
    return kept


def _keeps(z: Sizes, names: Sequence[str], item_bytes: int) -> bool:
    """Whether these layers keep their input as it is."""
    if z.autocast and item_bytes != z.c:
        return False
    return z.trains_all or (not z.dropout and bool(z.targets & set(names)))


def _weight_gradient(z: Sizes, names: Sequence[str]) -> int:
    """In flight while the largest of these matrices gets its gradient: in c, cast, and added to what is there."""
    if not z.trains_all:
        return 0
    return max(map(z.count, names)) * ((z.c if z.autocast else 0) + (4 if z.accumulates or z.autocast else 0))


def _cached(z: Sizes, names: Sequence[str]) -> int:
    """The 16-bit copies of trained matrices that autocast keeps."""
    if not z.autocast:
        return 0
    if z.trains_all:
        return sum(map(z.count, names)) * z.c if z.casts else 0
    return sum(z.R * sum(z.config.linear_shape(name)) * z.c for name in names if name in z.targets)


def attention(z: Sizes, first: bool, last: bool) -> Part:
    """Norm, q, k, v, rotation, attention, o and the residual addition; the last block goes on with P rows."""
    N, n, D, Q, K, c, s = z.N, z.P if last else z.N, z.D, z.Q, z.K, z.c, z.s
    made, leads_back = z.attention(), z.trains_all or not first
    x, h, qkv = N * D * s, N * D * s, N * (Q + 2 * K) * c
    # The norm keeps its input in fp32, and what it multiplies by its weight if that is trained.
    normed = (N * D * 4 if leads_back else 0) + (N * D * 4 if z.trains_all else 0)
    entered = sum(_linear(z, name, N, s, leads_back) for name in _INPUTS) + (h if _keeps(z, _INPUTS, s) else 0)
    entered += 4 * N * z.config.head_dim * c if c < 4 else 0  # cos and sin, cast for q and for k
    chosen = n * Q * c if last else 0
    left = _linear(z, "o_proj", n, c) + ((chosen or made.flat) if _keeps(z, ("o_proj",), c) else 0)
    kept = normed + entered + made.inputs + made.outputs + left
    forward = max(
        x + 3 * N * D * 4,
        x + normed + entered + h + qkv + max(4 * N * Q * c, made.forward),
        (x if s < 4 or not leads_back else 0) + kept + n * D * (c + 2 * s),
    )
    do = N * Q * c + chosen
    # With dropout, the mask and what it left go as their gradients come.
    lora_o = n * Q * c if "o_proj" in z.targets and not z.dropout else 0
    lora = N * D * s if z.targets & set(_INPUTS) else 0
    backward = (n * D * s + (x if last else 0)) + max(
        (n * D * c if s != c else 0) + n * Q * c + lora_o + _weight_gradient(z, ("o_proj",)),
        do + made.backward,
        do + qkv + 4 * N * Q * c - made.inputs - made.outputs,
        qkv + N * D * (c + 2 * s) + lora + _weight_gradient(z, ("q_proj",)) - made.inputs - made.outputs - left,
        N * D * s + 5 * N * D * 4 - (kept - normed),
    )
    return Part(kept, forward, backward, z.gradients(ATTENTION_MODULES), _cached(z, ATTENTION_MODULES))


def feed_forward(z: Sizes, last: bool) -> Part:
    """Norm, gate, up, SiLU, product, down and the residual addition."""
    n, D, c, s = z.P if last else z.N, z.D, z.c, z.s
    x, wide = n * D * s, n * z.F * c
    normed = n * D * 4 * (2 if z.trains_all else 1)
    opened = sum(_linear(z, name, n, s) for name in _OPENING) + (x if _keeps(z, _OPENING, s) else 0)
    keeps_product = _keeps(z, ("down_proj",), c)
    closed = _linear(z, "down_proj", n, c) + (wide if keeps_product else 0)
    kept = normed + opened + 3 * wide + closed  # gate, silu(gate) and up
    forward = (x if s < 4 else 0) + max(
        3 * n * D * 4,
        kept + x + (0 if keeps_product else wide) + n * D * c,
        kept + n * D * (c + 2 * s),
    )
    lora_down = n * z.R * c + (0 if z.dropout else wide) if "down_proj" in z.targets else 0
    lora = x if z.targets & set(_OPENING) else 0
    backward = x + max(
        (n * D * c if s != c else 0) + wide + lora_down + _weight_gradient(z, ("down_proj",)),
        3 * wide - closed,
        n * D * (c + s) + lora + _weight_gradient(z, ("up_proj",)) - closed,
        x + 5 * n * D * 4 - (kept - normed),
    )
    return Part(kept, forward, backward, z.gradients(FEED_FORWARD_MODULES), _cached(z, FEED_FORWARD_MODULES))
