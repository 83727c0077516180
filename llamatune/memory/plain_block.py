"""The bytes of ``model.transformer``'s block as autograd keeps and frees them: a walk forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

from llamatune.memory.attention import AttentionBytes
from llamatune.memory.ledger import Ledger, Passes, Tensor
from llamatune.memory.sizes import Sizes
from llamatune.shapes.llama_config import GATE_UP_MODULES, QKV_MODULES


def _kept_of_linear(z: Sizes, name: str, rows: int, item_bytes: int, leads_back: bool = True) -> int:
    """What is kept of a linear layer beside its input as it is: casts of both, and LoRA's own.

    ``leads_back``: the input needs a gradient, as all but the first frozen block's does.
    """
    out, in_ = z.config.linear_shape(name)
    narrowed = z.autocast and item_bytes != z.c
    kept = rows * in_ * z.c if z.trains_all and narrowed else 0
    if z.autocast and z.casts and not z.quantized and (z.trains_all or leads_back):
        kept += out * in_ * z.c
    if name in z.targets:
        r = z.rank(name)
        kept += rows * r * z.c + (r * (out + in_) * z.c if z.c < 4 else 0)
        if z.dropout and leads_back:
            kept += rows * in_ * (1 if z.cuda else item_bytes)  # the mask
        if z.from_base and z.c < 4:  # casts of the parts that are not trained
            kept += r * (out + in_) * z.c
        if (z.dropout or narrowed) and z.trains_A:
            kept += rows * in_ * (z.c if z.autocast else 4)
    return kept


def _head_norms(ledger: Ledger, z: Sizes, leads_back: bool) -> list[Tensor]:
    """Of the norms of the heads of q and k: both in fp32 where a gradient leads behind them, and divided by their
    mean squares where the weights are trained.
    """
    if not z.normed:
        return []
    widths = [width for name, width in (("q_proj", z.Q), ("k_proj", z.K)) if leads_back or name in z.targets]
    with ledger.step("norms of heads"):
        ledger.use("q and its square in fp32, normed q", 3 * z.N * z.Q * 4)
        return [ledger.keep("q and k in fp32, over their rms", z.N * sum(widths) * 4 * (2 if z.trains_all else 1))]


def _keeps_input(z: Sizes, names: Sequence[str], item_bytes: int) -> bool:
    """Whether these layers keep their input as it is."""
    if z.autocast and item_bytes != z.c:
        return False
    return z.trains_all or (z.trains_A and not z.dropout and bool(z.targets.intersection(names)))


def _of_lora_input(z: Sizes, names: Sequence[str], size: int) -> int:
    """The gradient of the input of A. With dropout, the mask goes as it comes, and what it left, if A is trained; else
    that of what it left comes first.
    """
    if not z.targets.intersection(names):
        return 0
    return size if not z.dropout else 0 if z.trains_A else 2 * size


def _weight_gradient(ledger: Ledger, z: Sizes, name: str) -> None:
    """The gradient of a trained matrix: in c, cast, and added to what is there."""
    size = z.count(name) * ((z.c if z.autocast else 0) + (4 if z.accumulates or z.autocast else 0))
    ledger.use(f"gradient of {name}'s weights", size if z.trains_all else 0)


def _magnitudes(ledger: Ledger, z: Sizes, names: Sequence[str], rows: int) -> Tensor:
    """What DoRA keeps of these layers, W x and B A x, once it has scaled them in fp32; its norms."""
    widths = [z.config.linear_shape(name)[0] for name in names if z.dora and name in z.targets]
    ledger.use("outputs in fp32", 3 * 4 * rows * max(widths, default=0))
    ledger.use("rows whose norms are taken", max(map(z.normed_at_once, names)))
    return ledger.keep("W x, B A x", 2 * rows * sum(widths) * z.c)


def _magnitudes_backward(ledger: Ledger, z: Sizes, names: Sequence[str], rows: int, kept: Tensor) -> None:
    widths = [z.config.linear_shape(name)[0] for name in names if z.dora and name in z.targets]
    ledger.use("gradients of outputs in fp32", 3 * 4 * rows * max(widths, default=0))
    ledger.free(kept)


def cached_casts(z: Sizes, names: Sequence[str]) -> int:
    """The 16-bit copies of trained matrices that autocast keeps; fused blocks make their own."""
    if z.fused or not z.autocast:
        return 0
    if z.trains_all:
        return sum(map(z.count, names)) * z.c if z.casts else 0
    return sum(z.rank(name) * sum(z.config.linear_shape(name)) * z.c for name in names)


def attention(ledger: Ledger, z: Sizes, first: bool, last: bool) -> Passes:
    """Norm, q, k, v, rotation, attention, o and the residual addition; the last block continues with P rows."""
    n, made, leads_back = z.P if last else z.N, AttentionBytes(z, z.lengths), z.trains_all or not first
    N, D, c, s = z.N, z.D, z.c, z.s
    x, norm = _norm(ledger, z, N, leads_back)
    with ledger.step("q, k, v"):
        keeps = _keeps_input(z, QKV_MODULES, s)
        h = ledger.make("normed x", N * D * s)
        kept = sum(_kept_of_linear(z, name, N, s, leads_back) for name in QKV_MODULES) + N * D * s * keeps
        # cos and sin are cast for q and for k
        projections = ledger.keep("of q, k, v", kept + (4 * N * z.config.head_dim * c if c < 4 else 0))
        qkv = ledger.make("q, k, v", N * (z.Q + 2 * z.K) * c)
        of_qkv = _magnitudes(ledger, z, QKV_MODULES, N)
    heads = _head_norms(ledger, z, leads_back)
    with ledger.step("rotation"):
        ledger.use("rotated", 4 * N * z.Q * c)
    with ledger.step("attention"):
        made.forward(ledger)
        ledger.free(qkv, h)
        inputs = ledger.keep("q, k, v", made.inputs)
        outputs = ledger.keep("output of attention", made.outputs)
    with ledger.step("o, residual"):
        flat = n * z.Q * c if last else made.flat
        o = ledger.keep("of o_proj", _kept_of_linear(z, "o_proj", n, c) + flat * _keeps_input(z, ("o_proj",), c))
        ledger.use("output of o_proj, its cast and the sum", n * D * (c + 2 * s))
        of_o = _magnitudes(ledger, z, ("o_proj",), n)
    ledger.free(x)

    yield

    dy = ledger.make("gradient of the half's output", n * D * s)
    spread = ledger.make("gradient of every row", N * D * s if last else 0)
    with ledger.step("o"):
        cast = ledger.make("cast of the gradient", n * D * c if s != c else 0)
        _magnitudes_backward(ledger, z, ("o_proj",), n, of_o)
        do = ledger.make("gradient of o_proj's input", n * z.Q * c)
        lora = ledger.make("gradient of LoRA's input", _of_lora_input(z, ("o_proj",), n * z.Q * c))
        _weight_gradient(ledger, z, "o_proj")
        ledger.free(cast, lora)
    with ledger.step("attention"):
        every_do = ledger.make("gradient of attention's output", N * z.Q * c if last else 0)
        ledger.free(made.backward(ledger), inputs, outputs, do, every_do, o)
    with ledger.step("rotation"):
        dqkv = ledger.make("gradients of q, k, v", N * (z.Q + 2 * z.K) * c)
        ledger.use("rotated", 4 * N * z.Q * c)
    if z.normed:
        with ledger.step("norms of heads"):
            ledger.use("gradients of q in fp32", N * z.Q * (3 * 4 + (c if c < 4 else 0)))
    ledger.free(*heads)
    with ledger.step("q, k, v"):
        _magnitudes_backward(ledger, z, QKV_MODULES, N, of_qkv)
        dh = ledger.make("gradient of the normed x and its casts", N * D * (c + 2 * s))
        lora = ledger.make("gradient of LoRA's input", N * D * s if z.targets.intersection(QKV_MODULES) else 0)
        _weight_gradient(ledger, z, "q_proj")
        ledger.free(dqkv, dh, lora, projections)
    _norm_backward(ledger, z, N)
    ledger.free(dy, spread, *norm)


def feed_forward(ledger: Ledger, z: Sizes, last: bool) -> Passes:
    """Norm, gate, up, SiLU, product, down and the residual addition."""
    n = z.P if last else z.N
    D, c, s, wide = z.D, z.c, z.s, n * z.F * z.c
    x, norm = _norm(ledger, z, n)
    with ledger.step("gate, up, SiLU"):
        h = ledger.make("normed x", n * D * s)
        kept = sum(_kept_of_linear(z, name, n, s) for name in GATE_UP_MODULES)
        gate_up = ledger.keep("of gate_proj and up_proj", kept + n * D * s * _keeps_input(z, GATE_UP_MODULES, s))
        gate = ledger.make("gate", wide)
        of_gate_up = _magnitudes(ledger, z, GATE_UP_MODULES, n)
        ledger.free(gate)
        activated = ledger.keep("gate, silu(gate) and up", 3 * wide)
    with ledger.step("down"):
        keeps = _keeps_input(z, ("down_proj",), c)
        down = ledger.keep("of down_proj", _kept_of_linear(z, "down_proj", n, c) + wide * keeps)
        product = ledger.make("silu(gate) up", 0 if keeps else wide)
        ledger.use("output of down_proj", n * D * c)
        of_down = _magnitudes(ledger, z, ("down_proj",), n)
        ledger.free(h, product)
    with ledger.step("residual"):
        ledger.use("output of down_proj, its cast and the sum", n * D * (c + 2 * s))
    ledger.free(x)

    yield

    dy = ledger.make("gradient of the half's output", n * D * s)
    with ledger.step("down"):
        cast = ledger.make("cast of the gradient", n * D * c if s != c else 0)
        _magnitudes_backward(ledger, z, ("down_proj",), n, of_down)
        da = ledger.make("gradient of down_proj's input", wide)
        of_lora = n * z.rank("down_proj") * c + _of_lora_input(z, ("down_proj",), wide)
        lora = ledger.make("gradient of LoRA's input", of_lora)
        _weight_gradient(ledger, z, "down_proj")
        ledger.free(cast, lora, down)
    with ledger.step("SiLU"):
        ledger.use("gradients of gate and up", 2 * wide)
        ledger.free(da)
    with ledger.step("gate, up"):
        _magnitudes_backward(ledger, z, GATE_UP_MODULES, n, of_gate_up)
        dh = ledger.make("gradient of the normed x and its cast", n * D * (c + s))
        lora = ledger.make("gradient of LoRA's input", n * D * s if z.targets.intersection(GATE_UP_MODULES) else 0)
        _weight_gradient(ledger, z, "up_proj")
        ledger.free(dh, lora, activated, gate_up)
    _norm_backward(ledger, z, n)
    ledger.free(dy, *norm)


def _norm(ledger: Ledger, z: Sizes, rows: int, leads_back: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Of a norm: x where the norm does not keep it, and what it keeps.

    That is x in fp32 if ``leads_back``, and what it multiplies by its weight if that is trained.
    """
    wide, leads = rows * z.D * 4, leads_back
    x = ledger.keep("x", rows * z.D * z.s if z.s < 4 or not leads else 0)
    with ledger.step("norm"):
        ledger.use("x and its square in fp32, normed x", 3 * wide)
        kept = [ledger.keep("x in fp32", wide if leads else 0), ledger.keep("x / rms", wide if z.trains_all else 0)]
    return x, kept


def _norm_backward(ledger: Ledger, z: Sizes, rows: int) -> None:
    with ledger.step("norm"):
        dx = ledger.make("gradient of x", rows * z.D * z.s)
        ledger.use("gradients in fp32", 5 * rows * z.D * 4)
        ledger.free(dx)
