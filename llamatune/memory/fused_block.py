"""The bytes of ``model.fused``: a walk through the fused block's functions, forward and backward."""

from __future__ import annotations

from llamatune.memory.attention import AttentionBytes
from llamatune.memory.ledger import Ledger, Passes, Tensor
from llamatune.memory.sizes import Sizes
from llamatune.shapes.llama_config import GATE_UP_MODULES, QKV_MODULES
from llamatune.shapes.tile_sizes import TILE_TOKENS


def _adapter(ledger: Ledger, z: Sizes, name: str, rows: int, back: bool) -> None:
    """What LoRA's part of a product has in flight."""
    if name not in z.targets:
        return
    (out, in_), r = z.config.linear_shape(name), z.rank(name)
    casts = r * (out + in_) * z.c * (2 if z.from_base else 1) if z.c < 4 and not z.cuda and not z.dora else 0
    thin, wide = rows * r * z.c, rows * in_ * z.c if z.dropout else 0
    mask = rows * in_ if z.dropout and z.cuda else wide
    ledger.use(f"{name}: rows whose norms DoRA takes", z.normed_at_once(name))
    # Another product with W, of x after dropout, or of x again in the backward pass.
    beside = rows * out * z.c + z.beside_product(name, rows, back) if z.dora and (back or z.dropout) else 0
    if back:
        gradients = z.gradients((name,))
        ledger.use(
            f"{name}: casts and gradients of A and B, dropout", casts + gradients + 2 * thin + mask + 2 * wide + beside
        )
    else:
        ledger.use(f"{name}: dropout's mask, and x where it keeps it", mask + wide)
        ledger.use(f"{name}: casts of A and B, and A x", casts + thin + (wide + mask + beside if beside else 0))


def _product(ledger: Ledger, z: Sizes, name: str, rows: int, back: bool = False, in_place: bool = False) -> Tensor:
    """The output of a linear layer, or the gradient with respect to its input; ``in_place``: of a tensor at hand."""
    width = 0 if in_place else z.config.linear_shape(name)[1 if back else 0]
    y = ledger.make(f"gradient of {name}'s input" if back else f"output of {name}", rows * width * z.c)
    ledger.use(f"{name}: cast or unpacked weights, x in float8", z.beside_product(name, rows, back))
    _adapter(ledger, z, name, rows, back)
    return y


def _norm(ledger: Ledger, z: Sizes, rows: int, back: bool = False) -> None:
    """The fp32 tiles of a norm."""
    tiles = 4 if back else 2
    ledger.use("fp32 tiles of the norm", (tiles + 1 if z.s < 4 else tiles) * 4 * min(rows, TILE_TOKENS) * z.D)


def _head_norms(ledger: Ledger, z: Sizes, back: bool = False) -> None:
    """The fp32 tiles of the norm of q's heads, which are the most, and the gradient that it gives."""
    tiles = (4 if back else 2) + (z.c < 4)
    if z.normed:
        gradient = ledger.make("gradient of q before its norm", z.N * z.Q * z.c if back else 0)
        ledger.use("fp32 tiles of the norm of heads", tiles * 4 * min(z.N, TILE_TOKENS) * z.Q)
        ledger.free(gradient)


def attention(ledger: Ledger, z: Sizes, last: bool, recompute: bool) -> Passes:
    """Norm, q, k, v, rotation, attention, o and the residual addition; the last block continues with P rows."""
    n, made = z.P if last else z.N, AttentionBytes(z, z.lengths)
    x = ledger.keep("x", z.N * z.D * z.s)
    qkv = _attention_inputs(ledger, z)
    with ledger.step("attention"):
        made.forward(ledger)
        ledger.free(*qkv)
        inputs = ledger.keep("q, k, v", 0 if recompute else made.inputs)
        raw = ledger.keep("q and k before their norms", 0 if recompute else z.N * z.normed * z.c)
        outputs = ledger.keep("output of attention", made.outputs)
        flat = ledger.keep("input of o_proj", n * z.Q * z.c if last else made.flat)
    with ledger.step("o, residual"):
        chosen = ledger.make("x of the rows that are asked for", n * z.D * z.s if last else 0)
        y = _product(ledger, z, "o_proj", n)
        ledger.use("sum", 0 if z.adds_in_products("o_proj") else n * z.D * z.s)
        ledger.free(y, chosen)

    yield

    dy = ledger.make("gradient of the half's output", n * z.D * z.s)
    with ledger.step("o"):
        cast = ledger.make("cast of the gradient", n * z.D * z.c if z.s != z.c else 0)
        do = _product(ledger, z, "o_proj", n, back=True)
        ledger.free(cast)
    if recompute:
        with ledger.step("again"):
            qkv = _attention_inputs(ledger, z)
            with ledger.step("attention"):
                made.forward(ledger)
            ledger.free(*qkv, inputs, raw)
            inputs = ledger.make("q, k, v", made.inputs)
            raw = ledger.make("q and k before their norms", z.N * z.normed * z.c)
    spread = ledger.make("gradient of every row", z.N * z.D * z.s if last else 0)
    with ledger.step("attention"):
        every_do = ledger.make("gradient of attention's output", z.N * z.Q * z.c if last else 0)
        gradients = made.backward(ledger)
        ledger.free(every_do, inputs, outputs, flat, gradients, *(() if recompute else (do,)))
    with ledger.step("q, k, v"):
        dqkv = ledger.make("gradients of q, k, v", z.N * (z.Q + 2 * z.K) * z.c)
        h = ledger.make("normed x", z.N * z.D * z.c if z.targets.intersection(QKV_MODULES) else 0)
        turned = ledger.make("copy of q's gradient", z.N * z.Q * z.c)
        ledger.use("rotation", z.N * z.Q * z.c * 3 // 2)
        _head_norms(ledger, z, back=True)
        dh = _product(ledger, z, "q_proj", z.N, back=True)  # k's and v's are added to it
        for name in QKV_MODULES[1:]:
            _adapter(ledger, z, name, z.N, back=True)
        ledger.free(turned, raw)
    with ledger.step("norm"):
        dx = ledger.make("gradient of x", z.N * z.D * z.s)
        _norm(ledger, z, z.N, back=True)
    ledger.free(dqkv, h, dh, dx, spread, dy, x, *((do,) if recompute else ()))


def _attention_inputs(ledger: Ledger, z: Sizes) -> list[Tensor]:
    with ledger.step("norm, q, k, v"):
        h = ledger.make("normed x", z.N * z.D * z.c)
        _norm(ledger, z, z.N)
        qkv = [_product(ledger, z, name, z.N) for name in QKV_MODULES]
        qkv += [ledger.make("q and k before their norms", z.N * z.normed * z.c)]
        _head_norms(ledger, z)
        ledger.use("rotation", z.N * z.Q * z.c * 3 // 2)
        ledger.free(h)
    return qkv


def feed_forward(ledger: Ledger, z: Sizes, last: bool, recompute: bool) -> Passes:
    """Norm, gate, up, SiLU, product, down and the residual addition, a tile of rows at a time."""
    n = z.P if last else z.N
    wide = n * z.D * z.s
    x = ledger.keep("x", wide)
    kept = ledger.keep("gate and up", 0 if recompute else 2 * n * z.F * z.c)
    y = ledger.make("output of the half", wide)
    _feed_forward_forward(ledger, z, n, recompute)
    ledger.free(y)

    yield

    dy = ledger.make("gradient of the half's output", wide)
    dx = _feed_forward_gradients(ledger, z, n, recompute)
    ledger.free(dy, dx, x, kept)


def _feed_forward_forward(ledger: Ledger, z: Sizes, rows: int, recompute: bool) -> None:
    """Gate and up that are kept are the caller's; else a tile of rows goes through all three matrices."""
    tile = min(rows, TILE_TOKENS)
    with ledger.step("norm, gate, up"):
        h = ledger.make("normed x", (tile if recompute else rows) * z.D * z.c)
        _norm(ledger, z, rows)
        gate_up = [_product(ledger, z, name, tile, in_place=not recompute) for name in GATE_UP_MODULES]
        ledger.free(h)
    with ledger.step("down"):
        activated = ledger.make("silu(gate) up", 0 if recompute else tile * z.F * z.c)
        y = _product(ledger, z, "down_proj", tile, in_place=z.adds_in_products("down_proj"))
        ledger.free(y, activated, *gate_up)


def _feed_forward_gradients(ledger: Ledger, z: Sizes, rows: int, recompute: bool) -> Tensor:
    """The gradient of x: of all rows where gate and up are kept, whose gradients take their places, else by tiles."""
    tile = min(rows, TILE_TOKENS)
    span, wide, adapted = tile if recompute else rows, tile * z.F * z.c, z.targets.intersection(GATE_UP_MODULES)
    dx = ledger.make("gradient of x", rows * z.D * z.s)
    h, gate_up = ledger.make("normed x", 0), list[Tensor]()
    if recompute:
        with ledger.step("gate and up again"):
            h = ledger.make("normed x of a tile", tile * z.D * z.c)
            _norm(ledger, z, rows)
            gate_up = [_product(ledger, z, name, tile) for name in GATE_UP_MODULES]
    with ledger.step("down"):
        activated = ledger.make("silu(gate) up", wide if "down_proj" in z.targets else 0)
        cast = ledger.make("cast of the gradient", tile * z.D * z.c if z.s != z.c else 0)
        da = _product(ledger, z, "down_proj", tile, back=True)
        ledger.free(activated, cast)
    with ledger.step("SiLU"):
        ledger.use("sigmoid, silu and slope of gate", 3 * wide)
        ledger.free(da)
    with ledger.step("gate, up"):
        if not recompute:
            h = ledger.make("normed x", rows * z.D * z.c if adapted else 0)
        dh = ledger.make("gradient of the normed x", span * z.D * z.c)
        _product(ledger, z, "gate_proj", tile, back=True, in_place=True)
        more = _product(ledger, z, "up_proj", tile, back=True, in_place=z.cuda)
        ledger.free(more, h, *gate_up)
    with ledger.step("norm"):
        _norm(ledger, z, rows, back=True)
        ledger.free(dh)
    return dx


def recomputed_block(ledger: Ledger, z: Sizes, last: bool) -> Passes:
    """Both halves, of which only the block's input is kept."""
    n = z.P if last else z.N
    x = ledger.make("x", z.N * z.D * z.s)
    with ledger.keeping_nothing():
        next(attention(ledger, z, last, recompute=False))
        middle = ledger.make("x after attention", n * z.D * z.s)
        _feed_forward_forward(ledger, z, n, recompute=True)
        ledger.free(middle)

    yield

    dy = ledger.make("gradient of the block's output", n * z.D * z.s)
    with ledger.step("again"):
        ledger.free(x)  # the walk of the half makes it
        again = attention(ledger, z, last, recompute=False)
        next(again)
    middle = ledger.make("x after attention", n * z.D * z.s)
    ledger.free(_feed_forward_gradients(ledger, z, n, recompute=True))  # the gradient that attention's walk makes
    next(again, None)
    ledger.free(dy, middle)
