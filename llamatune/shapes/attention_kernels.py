"""Which kernel computes attention, and when with a mask: one rule for the model and for the memory plan. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

from llamatune.shapes.capabilities import OLDEST_WITH_BF16, Capability
from llamatune.shapes.tile_sizes import SHORT_TOKENS

Gpu = bool | Capability | None
"""What a step is planned for. A capability, or True: a GPU that is not at hand. Otherwise a CPU."""

FEWEST_IN_PARTS = 128
"""Queries behind other tokens that a CPU computes in two parts about as fast as with a mask, which takes memory."""

WIDENED_AT_ONCE = 1 << 17
"""Numbers of keys, and as many of values, that a CPU casts to fp32 at once for one query: they stay in its caches."""

LEAST_BY_PRODUCTS = 1 << 18
"""Least numbers of keys in fp32 of which a step of decoding on a CPU computes attention by products of matrices."""


class Kernel(Enum):
    """How attention is computed."""

    VARLEN = "varlen"
    """FlashAttention over several samples of a row in one call; k and v are repeated for each query head."""
    SDPA = "sdpa"
    """torch's scaled_dot_product_attention, a call for each length: FlashAttention on a GPU. k and v as they are."""
    EFFICIENT = "efficient"
    """The same by its memory-efficient kernel, for which k and v are repeated and heads filled up to ``head_room``."""
    FP32 = "fp32"
    """torch's scaled_dot_product_attention in fp32, of tensors in bf16, which are what is kept."""


class OneQuery(Enum):
    """How a CPU computes attention of the only query of each head."""

    KERNEL = "kernel"
    """torch's scaled_dot_product_attention."""
    TWICE = "twice"
    """The same, with each query twice: MKL multiplies two rows of bf16 in about half of the time of one."""
    WIDENED = "widened"
    """The same in fp32, of tensors in fp16, which MKL multiplies slowly."""
    PRODUCTS = "products"
    """Two products of matrices."""


def choose_kernel(
    capability: Capability | None,
    dtype: str,
    head_dim: int,
    tokens: int,
    samples: int = 1,
    mask: str = "causal",
    recurs: bool = False,
) -> Kernel:
    """The kernel for ``samples`` in one row, the one in question of ``tokens``.

    On a GPU torch falls back to a matrix of T x T scores, kept for the backward pass, where k and v have fewer heads
    than q and FlashAttention does not run: below compute capability 8, in fp32, with a mask, with heads above 256.

    Args:
        capability: None is a CPU.
        dtype: ``float64``, ``float32``, ``bfloat16`` or ``float16``.
        mask: ``causal``; ``given`` as a tensor; ``none``: queries follow all keys, as in decoding.
        recurs: code for this number of tokens is likely to have been compiled.
    """
    if capability is None:
        short = dtype == "bfloat16" and mask == "causal" and tokens <= SHORT_TOKENS and not recurs
        return Kernel.FP32 if short else Kernel.SDPA
    if mask == "given" or not _flash_runs(capability, dtype, head_dim):
        return Kernel.EFFICIENT
    return Kernel.VARLEN if samples > 1 and head_dim % 8 == 0 else Kernel.SDPA


def takes_mask(start: int, queries: int, window: int | None, device: str) -> bool:
    """Whether attention of a sample's ``queries`` from place ``start`` on takes a mask, on a ``cpu`` or ``cuda``."""
    if window is not None and start + queries > window:
        return True
    return start > 0 and queries > 1 and (device != "cpu" or queries < FEWEST_IN_PARTS)


def choose_for_one_query(dtype: str, queries_of_a_key: int, key_numbers: int) -> OneQuery:
    """How a CPU without AMX, with which it was not measured, computes attention of the only query of each head.

    Args:
        queries_of_a_key: heads of queries that share a head of keys.
        key_numbers: of all keys (B, K, S, E).
    """
    if dtype == "float32" and key_numbers >= LEAST_BY_PRODUCTS:
        return OneQuery.PRODUCTS
    if dtype == "float16":
        return OneQuery.WIDENED
    return OneQuery.TWICE if dtype == "bfloat16" and queries_of_a_key == 1 else OneQuery.KERNEL


def beyond_window(lengths: Sequence[int], window: int | None) -> list[int]:
    """The lengths of those samples that a sliding window cuts, each once: they are computed with a mask.

    A row that holds one is computed a sample at a time.
    """
    return sorted({tokens for tokens in lengths if window is not None and tokens > window})


def head_room(kernel: Kernel, capability: Capability | None, dtype: str, head_dim: int) -> int:
    """The head size that ``kernel`` computes with: on a GPU whole 16 bytes, and torch fills up for FlashAttention."""
    whole = {"float64": 2, "float32": 4}.get(dtype, 8)
    return head_dim if capability is None else -(-head_dim // whole) * whole


def _flash_runs(capability: Capability, dtype: str, head_dim: int) -> bool:
    """Forward and backward."""
    if 192 < head_dim <= 224 and capability not in ((8, 0), (9, 0), (10, 0)):
        return False  # the backward pass wants more shared memory than other GPUs have
    return capability >= OLDEST_WITH_BF16 and dtype in ("bfloat16", "float16") and head_dim <= 256
