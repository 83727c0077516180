"""The bytes of ``model.lean``: a walk through the lean block's functions, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

from llamatune.memory.attention import AttentionBytes
from llamatune.memory.ledger import Ledger, Tensor
from llamatune.memory.sizes import Sizes
from llamatune.shapes.limits import TILE_TOKENS

_INPUTS, _OPENING = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def _adapter(ledger: Ledger, z: Sizes, name: str, rows: int, back: bool) -> None:
    """What LoRA's part of a product has in flight."""
    if name not in z.targets:
        return
    out, in_ = z.config.linear_shape(name)
    casts = z.R * (out + in_) * z.c if z.c < 4 else 0
    thin, wide = rows * z.R * z.c, rows * in_ * z.c if z.dropout else 0
    if back:
        gradients = z.R * (out + in_) * 4
        ledger.use(f"{name}: casts and gradients of A and B, dropout", casts + gradients + 2 * thin + 3 * wide)
    else:
        ledger.use(f"{name}: dropout's mask, and x where it keeps it", 2 * wide)
        ledger.use(f"{name}: casts of A and B, and A x", casts + thin)


def _product(ledger: Ledger, z: Sizes, name: str, rows: int, back: bool = False) -> Tensor:
    """The output of a linear layer, or the gradient with respect to its input."""
    width = z.config.linear_shape(name)[1 if back else 0]
    y = ledger.make(f"gradient of {name}'s input" if back else f"output of {name}", rows * width * z.c)
    ledger.use(f"{name}: cast or unpacked weights", z.matrix(name))
    _adapter(ledger, z, name, rows, back)
    return y


def _norm(ledger: Ledger, z: Sizes, rows: int, back: bool = False) -> None:
    """The fp32 tiles of a norm."""
    tiles = 4 if back else 2
    ledger.use("fp32 tiles of the norm", (tiles + 1 if z.s < 4 else tiles) * 4 * min(rows, TILE_TOKENS) * z.D)


class _SavedAttention(NamedTuple):
    x: Tensor
    inputs: Tensor
    outputs: Tensor
    flat: Tensor


class Attention:
    """Norm, q, k, v, rotation, attention, o and the residual addition; the last block continues with P rows."""

    def __init__(self, z: Sizes, last: bool, recompute: bool) -> None:
        self.z, self.last, self.recompute, self.bytes = z, last, recompute, AttentionBytes.of(z)
        self.rows = z.P if last else z.N

    def _inputs(self, ledger: Ledger) -> list[Tensor]:
        z = self.z
        with ledger.step("norm, q, k, v"):
            h = ledger.make("normed x", z.N * z.D * z.c)
            _norm(ledger, z, z.N)
            qkv = [_product(ledger, z, name, z.N) for name in _INPUTS]
            ledger.use("rotation", z.N * z.Q * z.c * 3 // 2)
            ledger.free(h)
        return qkv

    def forward(self, ledger: Ledger) -> _SavedAttention:
        z, n, made = self.z, self.rows, self.bytes
        x = ledger.keep("x", z.N * z.D * z.s)
        qkv = self._inputs(ledger)
        with ledger.step("attention"):
            made.forward(ledger)
            ledger.free(*qkv)
            inputs = ledger.keep("q, k, v", 0 if self.recompute else made.inputs)
            outputs = ledger.keep("output of attention", made.outputs)
            flat = ledger.keep("input of o_proj", n * z.Q * z.c if self.last else made.flat)
        with ledger.step("o, residual"):
            y = _product(ledger, z, "o_proj", n)
            ledger.use("sum", n * z.D * z.s * (2 if self.last else 1))  # the last block's x is chosen first
            ledger.free(y)
        return _SavedAttention(x, inputs, outputs, flat)

    def backward(self, ledger: Ledger, saved: _SavedAttention) -> None:
        z, n, made, last = self.z, self.rows, self.bytes, self.last
        dy = ledger.make("gradient of the half's output", n * z.D * z.s)
        with ledger.step("o"):
            cast = ledger.make("cast of the gradient", n * z.D * z.c if z.s != z.c else 0)
            do = _product(ledger, z, "o_proj", n, back=True)
            ledger.free(cast)
        inputs = saved.inputs
        if self.recompute:
            with ledger.step("again"):
                qkv = self._inputs(ledger)
                with ledger.step("attention"):
                    made.forward(ledger)
                ledger.free(*qkv, inputs)
                inputs = ledger.make("q, k, v", made.inputs)
        spread = ledger.make("gradient of every row", z.N * z.D * z.s if last else 0)
        with ledger.step("attention"):
            every_do = ledger.make("gradient of attention's output", z.N * z.Q * z.c if last else 0)
            gradients = made.backward(ledger)
            ledger.free(do, every_do, inputs, saved.outputs, saved.flat, gradients)
        with ledger.step("q, k, v"):
            dqkv = ledger.make("gradients of q, k, v", z.N * (z.Q + 2 * z.K) * z.c)
            h = ledger.make("normed x", z.N * z.D * z.c if z.targets.intersection(_INPUTS) else 0)
            turned = ledger.make("copy of q's gradient", z.N * z.Q * z.c)
            ledger.use("rotation", z.N * z.Q * z.c * 3 // 2)
            dh = _product(ledger, z, "q_proj", z.N, back=True)  # k's and v's are added to it
            for name in _INPUTS[1:]:
                _adapter(ledger, z, name, z.N, back=True)
            ledger.free(turned)
        with ledger.step("norm"):
            dx = ledger.make("gradient of x", z.N * z.D * z.s)
            _norm(ledger, z, z.N, back=True)
        ledger.free(dqkv, h, dh, dx, spread, dy, saved.x)


class _SavedFeedForward(NamedTuple):
    x: Tensor
    gate_up: Tensor


class FeedForward:
    """Norm, gate, up, SiLU, product, down and the residual addition, a tile of rows at a time."""

    def __init__(self, z: Sizes, last: bool, recompute: bool) -> None:
        self.z, self.recompute = z, recompute
        self.rows = z.P if last else z.N
        self.tile = min(self.rows, TILE_TOKENS)
        self.narrow, self.wide = self.tile * z.D * z.c, self.tile * z.F * z.c

    def forward_tile(self, ledger: Ledger) -> None:
        z, T = self.z, self.tile
        with ledger.step("norm, gate, up"):
            h = ledger.make("normed x of a tile", self.narrow)
            _norm(ledger, z, self.rows)
            gate_up = [_product(ledger, z, name, T) for name in _OPENING]
        with ledger.step("down"):
            ledger.free(_product(ledger, z, "down_proj", T), h, *gate_up)

    def forward(self, ledger: Ledger) -> _SavedFeedForward:
        z, n, T = self.z, self.rows, self.tile
        x = ledger.keep("x", n * z.D * z.s)
        kept = ledger.keep("gate and up", 0 if self.recompute else 2 * n * z.F * z.c)
        earlier = ledger.make("outputs of earlier tiles", (n - T) * z.D * z.c)
        self.forward_tile(ledger)
        ledger.free(earlier)
        with ledger.step("residual"):
            y = ledger.make("output of down_proj", n * z.D * z.c)
            ledger.use("tiles joined", n * z.D * z.c if n > T else 0)
            ledger.use("sum", n * z.D * z.s)
            ledger.free(y)
        return _SavedFeedForward(x, kept)

    def backward_tiles(self, ledger: Ledger) -> Tensor:
        """The gradient of x."""
        z, T, narrow, wide = self.z, self.tile, self.narrow, self.wide
        dx = ledger.make("gradient of x", self.rows * z.D * z.s)
        cast = ledger.make("cast of the gradient", narrow if z.s != z.c else 0)
        with ledger.step("gate and up again" if self.recompute else "norm again"):
            wants_input = self.recompute or bool(z.targets.intersection(_OPENING))
            again = [ledger.make("normed x of a tile", narrow if wants_input else 0)]
            if self.recompute:
                _norm(ledger, z, self.rows)
                again += [_product(ledger, z, name, T) for name in _OPENING]
        with ledger.step("down"):
            activated = ledger.make("silu(gate) up", wide if "down_proj" in z.targets else 0)
            da = _product(ledger, z, "down_proj", T, back=True)
            ledger.free(activated)
        with ledger.step("SiLU"):
            ledger.use("sigmoid, silu and slope of gate", 3 * wide)
            dgate = ledger.make("gradient of gate", wide)
        with ledger.step("gate, up"):
            dh = _product(ledger, z, "gate_proj", T, back=True)
            ledger.free(_product(ledger, z, "up_proj", T, back=True), dgate, da, *again, cast)
        with ledger.step("norm"):
            tile = ledger.make("gradient of a tile of x", T * z.D * z.s)
            _norm(ledger, z, self.rows, back=True)
            ledger.free(dh, tile)
        return dx

    def backward(self, ledger: Ledger, saved: _SavedFeedForward) -> None:
        x = self.rows * self.z.D * self.z.s
        dy = ledger.make("gradient of the half's output", x)
        dx = self.backward_tiles(ledger)
        with ledger.step("residual"):
            ledger.use("sum", x)
        ledger.free(dy, dx, *saved)


class RecomputedBlock:
    """Both halves of which only the block's input is kept."""

    def __init__(self, z: Sizes, last: bool) -> None:
        self.z, self.attention = z, Attention(z, last, recompute=False)
        self.feed_forward = FeedForward(z, last, recompute=True)
        self.middle = self.attention.rows * z.D * z.s

    def forward(self, ledger: Ledger) -> Tensor:
        x = ledger.make("x", self.z.N * self.z.D * self.z.s)
        ledger.keeping = False
        self.attention.forward(ledger)
        middle = ledger.make("x after attention", self.middle)
        self.feed_forward.forward_tile(ledger)
        ledger.free(middle)
        ledger.keeping = True
        return x

    def backward(self, ledger: Ledger, x: Tensor) -> None:
        dy = ledger.make("gradient of the block's output", self.middle)
        with ledger.step("again"):
            ledger.free(x)  # the walk of the half makes it
            saved = self.attention.forward(ledger)
        middle = ledger.make("x after attention", self.middle)
        ledger.free(self.feed_forward.backward_tiles(ledger))  # the gradient that attention's walk makes
        self.attention.backward(ledger, saved)
        ledger.free(dy, middle)
