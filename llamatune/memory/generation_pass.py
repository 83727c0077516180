"""Memory of one forward pass of generation, tensor by tensor as ``model.transformer`` makes them, and of sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from llamatune.memory import int8_products
from llamatune.memory.attention import AttentionBytes
from llamatune.memory.ledger import Ledger, Tensor
from llamatune.memory.model_sizes import ModelSizes
from llamatune.processor import has_amx
from llamatune.shapes.attention_kernels import (
    WIDENED_AT_ONCE,
    Kernel,
    OneQuery,
    beyond_window,
    choose_for_one_query,
    choose_kernel,
    head_room,
)
from llamatune.shapes.llama_config import GATE_UP_MODULES, QKV_MODULES
from llamatune.shapes.tile_sizes import COMPARED_AT_ONCE, drawn_rows

CACHE = "keys and values"


Choice = Callable[[Ledger, ModelSizes, int], None]
"""What chooses tokens by the logits of so many rows, which are alive."""


class Cache(NamedTuple):
    """Bytes of a layer's keys and values before and after a pass, and ``beside`` of all those of another model."""

    held: int
    grown: int
    beside: int


@dataclass(frozen=True)
class Pass:
    """A pass over ``tokens`` in all, ``read`` of which give logits.

    Either they are samples of ``lengths``, those that fill up the pass included, or ``rows`` that go on, and their mask
    is over ``keys`` of each. ``is_part``: a further part of a prompt, whose mask the model makes; without ``keys`` it
    has no mask. ``selects``: the last block computes nothing else but what is read. ``left``: rows whose logits,
    log-probabilities and sums are there from the pass before. ``filling``: of the logits, those of no token.
    """

    tokens: int
    read: int
    cache: Cache
    choice: Choice
    lengths: tuple[int, ...] = ()
    rows: int = 1
    keys: int = 0
    is_part: bool = False
    selects: bool = False
    left: int = 0
    filling: int = 0


def walk(ledger: Ledger, z: ModelSizes, p: Pass) -> None:
    """The pass and what follows it; of layers that are alike, the last ones, where the cache is largest."""
    layers, N, E = z.config.num_hidden_layers, p.tokens, z.config.head_dim
    before = min(layers, 2)
    caches = [ledger.make(CACHE, p.cache.beside)]
    waiting = [ledger.make(CACHE, p.cache.held) for _ in range(before)]
    earlier = ledger.make(CACHE, (layers - before) * p.cache.held)
    with ledger.step("embedding"):
        before_it = ledger.make("logits of the step before", p.left * z.V * z.c)
        scores = ledger.make("scores of the step before", p.left * z.V * 8)
        shared = [ledger.make("ids, positions", 3 * 8 * N), *_mask(ledger, z, p)]
        x = ledger.make("x", N * z.D * z.c)
        ledger.use("angles of the rotation", 5 * N * E * 4)
        shared.append(ledger.make("rotation", 2 * N * E * 4))
    ledger.free(earlier)
    caches.append(ledger.make(CACHE, (layers - before) * p.cache.grown))
    for layer in range(layers - before, layers):
        after, grown = _block(ledger, z, p, waiting.pop(0), layer == layers - 1)
        caches.append(grown)
        if layer < layers - 1:
            ledger.free(x)
            x = after
    with ledger.step("head"):
        width = z.D * (p.read if p.selects else N)
        hidden = _normed(ledger, z, width)
        ledger.free(after)
        logits = ledger.make("logits", p.read * z.V * z.c)
    ledger.free(hidden, x, before_it, *shared)
    with ledger.step("choice of tokens"):
        p.choice(ledger, z, p.read - p.filling)
    ledger.free(logits, scores, *caches)


def sample(ledger: Ledger, z: ModelSizes, rows: int) -> None:
    """``inference.sampling`` with a nucleus: the distribution, sorted, its sums and what is left of it, and the last
    one's place again, of some rows at a time.
    """
    at_once = min(rows, drawn_rows(z.V, z.device))
    wide = ledger.make("logits in fp32", 4 * at_once * z.V if z.c < 4 else 0)
    ledger.use("distribution sorted and summed", (4 * 4 + 8 + 1 + 4) * at_once * z.V)
    ledger.free(wide)


def take_likeliest(ledger: Ledger, z: ModelSizes, rows: int) -> None:
    """The largest logit of each row; in bf16 with AMX they are in columns, and compared by halves, some at a time."""
    of_several = rows * z.V if rows > 1 and z.c < 4 and z.device == "cpu" and has_amx() else 0
    ledger.use("largest of halves of logits", min(of_several, COMPARED_AT_ONCE) * z.c * 3 // 4)


def choose_beams(ledger: Ledger, z: ModelSizes, rows: int) -> None:
    """Log-probabilities and sums of a step of beam search."""
    ledger.use("log-probabilities and sums", 8 * rows * z.V)


def _block(ledger: Ledger, z: ModelSizes, p: Pass, held: Tensor, last: bool) -> tuple[Tensor, Tensor]:
    """From x, which is the caller's, to the block's output and the layer's keys and values."""
    N, n = p.tokens, p.read if last and p.selects else p.tokens
    D, c = z.D, z.c
    with ledger.step("attention"):
        h = _normed(ledger, z, N * D)
        if _joins(z):
            v = _joined_product(ledger, z, QKV_MODULES, N)  # q, k and v are parts of it
            q_and_k = [_normed(ledger, z, N * width) for width in (z.Q, z.K)] if z.normed else []
        else:
            *q_and_k, v = (_heads(ledger, z, name, N) for name in QKV_MODULES)
        widths = (z.Q + z.K,) if _joins(z) and not z.normed else (z.Q, z.K)
        turned = [_turned(ledger, z, N, width) for width in widths]
        ledger.free(*q_and_k)
        cache = ledger.make(CACHE, p.cache.grown) if p.cache.grown > p.cache.held else held
        if cache != held:
            ledger.free(held)
        q, *k_and_v = [*turned, v]  # q with k, where both are turned at once
        if p.is_part:  # attention takes those of the cache
            ledger.free(*k_and_v)
            k_and_v = []
        if p.lengths:
            AttentionBytes(z, p.lengths, recurs=not has_amx()).forward(ledger)
        elif p.is_part and not p.keys:
            _attention_in_parts(ledger, z, N)
        else:
            ledger.use("mask, keys and values for the kernel", _to_keys(z, p))
        o = ledger.make("output of attention", N * z.Q * c)
        chosen = ledger.make("rows that are read of it", n * z.Q * c if n < N else 0)
        y = _product(ledger, z, "o_proj", n)
        ledger.free(h, q, *k_and_v, o, chosen)
        chosen = ledger.make("rows that are read of x", n * D * c if n < N else 0)
        middle = ledger.make("x after attention", n * D * c)
        ledger.free(y, chosen)
    with ledger.step("feed-forward"):
        h = _normed(ledger, z, n * D)
        if _joins(z):
            gate_up = [_joined_product(ledger, z, GATE_UP_MODULES, n)]
        else:
            gate_up = [_product(ledger, z, name, n) for name in GATE_UP_MODULES]
        activated = ledger.make("silu(gate) up", n * z.F * c) if z.kernels else gate_up.pop(0)
        ledger.free(*gate_up)
        y = _product(ledger, z, "down_proj", n)
        ledger.free(activated, h)
        after = ledger.make("x after the block", n * D * c)
        ledger.free(y, middle)
    return after, cache


def _normed(ledger: Ledger, z: ModelSizes, count: int) -> Tensor:
    """So many numbers through a norm, which computes in fp32."""
    made = ledger.make("normed", count * z.c)
    ledger.use("x and its square in fp32", 0 if z.kernels else count * 4 * (1 if z.c == 4 else 2))
    return made


def _joins(z: ModelSizes) -> bool:
    """Whether q, k, v are counted as one product, and gate, up: large ones are where the file has them adjacent."""
    return z.device == "cpu" and z.dtype not in ("nf4", "float8")


def _joined_product(ledger: Ledger, z: ModelSizes, names: Sequence[str], rows: int) -> Tensor:
    """The outputs of linear layers with one input in one tensor, and what each has beside it."""
    y = ledger.make(f"output of {', '.join(names)}", rows * z.c * sum(z.config.linear_shape(name)[0] for name in names))
    for name in names:
        _use_beside(ledger, z, name, rows)
    return y


def _product(ledger: Ledger, z: ModelSizes, name: str, rows: int) -> Tensor:
    """The output of a linear layer."""
    y = ledger.make(f"output of {name}", rows * z.config.linear_shape(name)[0] * z.c)
    _use_beside(ledger, z, name, rows)
    return y


def _use_beside(ledger: Ledger, z: ModelSizes, name: str, rows: int) -> None:
    """What the product of a linear layer needs beside its output, and LoRA's output in fp32."""
    out, in_ = z.config.linear_shape(name)
    by_digits = int8_products.in_onednn_layout(z, name)
    ledger.use("x in digits", int8_products.digits(z, name, rows))
    ledger.use("unpacked weights, x in float8", 0 if by_digits else z.beside_product(name, rows, back=False))
    if name in z.targets:
        wide = in_ * (4 if z.c < 4 else 0) + 4 * z.rank(name) + out * (16 if z.dora else 8 + z.c)
        ledger.use(f"{name}: rows whose norms DoRA takes", z.normed_at_once(name))
        ledger.use(f"{name}: x, A x and B A x in fp32, scaled and added", rows * wide)


def _heads(ledger: Ledger, z: ModelSizes, name: str, N: int) -> Tensor:
    """q, k or v, whose heads may have norms."""
    x = _product(ledger, z, name, N)
    if z.normed and name != "v_proj":
        normed = _normed(ledger, z, N * z.config.linear_shape(name)[0])
        ledger.free(x)
        return normed
    return x


def _turned(ledger: Ledger, z: ModelSizes, N: int, width: int) -> Tensor:
    """The rotation of q, k or both, its parts, and the casts of the angles."""
    casts = 2 * N * z.config.head_dim * z.c if z.c < 4 else 0
    ledger.use("parts of the rotation", 0 if z.kernels else casts + 5 * N * width * z.c // 2)
    return ledger.make("q, k turned", N * width * z.c)


def _mask(ledger: Ledger, z: ModelSizes, p: Pass) -> list[Tensor]:
    """Of rows that go on, and of samples that are longer than the sliding window."""
    made = []
    for length in beyond_window(p.lengths, z.config.sliding_window):
        made.append(ledger.make("mask of the window", length * -(-length // 8) * 8 * z.c))
        ledger.use("what is inside of the window", 3 * length * length)
    cells = p.tokens * p.keys
    ledger.use("parts of the mask", 2 * cells)
    mask = ledger.make("mask", cells)
    added = ledger.make("mask that is added to scores", cells * z.c if z.device == "cpu" else 0)
    if p.is_part and z.device == "cpu":  # the model makes it, and keeps what is added alone
        ledger.free(mask)
        return [*made, added]
    return [*made, mask, added]


def _attention_in_parts(ledger: Ledger, z: ModelSizes, N: int) -> None:
    """Of N tokens: what those before them give and what they give themselves, and both in fp32."""
    outputs = ledger.make("outputs of both parts", 2 * N * z.Q * z.c)
    laid_out = ledger.make("output of heads that share keys, laid out anew", N * z.Q * z.c if z.Q != z.K else 0)
    ledger.use("both in fp32", 2 * N * z.Q * 4 if z.c < 4 else 0)
    ledger.free(outputs, laid_out)


def _to_keys(z: ModelSizes, p: Pass) -> int:
    """Beside q, k and v of rows that go on: the mask in the dtype of scores, and what the kernel wants."""
    if z.device == "cpu":
        return _of_one_query(z, p)
    kernel = choose_kernel(z.capability, z.computed, z.config.head_dim, p.tokens // p.rows, 1, "given")
    mask = p.tokens * p.keys * z.c
    if kernel is not Kernel.EFFICIENT:
        return mask
    room = head_room(kernel, z.capability, z.computed, z.config.head_dim)
    heads, keys = z.config.num_attention_heads, p.rows * p.keys
    if p.tokens == p.rows:  # one query of each row: heads of keys are not repeated
        filled = (2 * keys * z.config.num_key_value_heads + p.tokens * heads) * room * z.c
        return mask + (filled if room > z.config.head_dim else 0)
    repeated = 2 * keys * z.Q * z.c if z.Q != z.K else 0
    filled = (2 * keys + p.tokens) * heads * room * z.c if room > z.config.head_dim else 0
    return mask + repeated + filled


def _of_one_query(z: ModelSizes, p: Pass) -> int:
    """What a CPU makes for the only query of each row; queries that stand twice are fewer than the rotation's parts."""
    heads, cells = z.config.num_attention_heads, p.rows * p.keys
    if p.tokens > p.rows or has_amx():
        return 0
    match choose_for_one_query(z.computed, heads // z.config.num_key_value_heads, cells * z.K):
        case OneQuery.WIDENED:  # keys and values of a part, all queries, the mask
            return 4 * (2 * max(WIDENED_AT_ONCE, p.keys * z.config.head_dim) + p.rows * z.Q + cells)
        case OneQuery.PRODUCTS:  # scores before and after softmax, as if all rows were as long
            return 2 * 4 * cells * heads
    return 0


def highest(z: ModelSizes, passes: Sequence[Pass]) -> tuple[int, int]:
    """Keys and values, and temporaries, at the highest moment of some passes."""
    return max((_highest(z, p) for p in passes), key=sum)


def _highest(z: ModelSizes, p: Pass) -> tuple[int, int]:
    ledger = Ledger()
    walk(ledger, z, p)
    assert not ledger.live_bytes, f"still alive after the pass: {ledger.alive()}"
    top = max(ledger.take_moments(), key=lambda moment: moment.bytes)
    cached = sum(size for name, size in top.tensors if name == CACHE)
    return cached, top.bytes - cached
