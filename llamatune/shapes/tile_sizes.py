"""How much is computed at once: tile sizes and portions that bound the memory in flight. No torch.

The model computes by them and the memory plan counts by them. Portions differ by device: ``cuda`` or ``cpu``.
"""

from __future__ import annotations

TILE_TOKENS = 2048
"""Rows that a fused block has in flight where nothing of them is kept."""

SHORT_TOKENS = 256
"""Longest sample of bf16 whose attention is computed in fp32 on a CPU: it is quicker than the kernel in bf16 where a
length is new, about twice at 120 tokens. Where code for a length is compiled, bf16 is quicker, 2 to 5 times."""

LOGIT_BYTES_AT_ONCE = {"cuda": 1 << 26, "cpu": 1 << 24}
"""Bytes of logits in flight: in 16 bits 1,048 rows of LLaMA-2's vocabulary; on a CPU 262, which stay near its cache."""

WIDE_LOGITS_AT_ONCE = {"cuda": 1 << 25, "cpu": 1 << 19}
"""Logits whose loss is computed at once, in fp32: on a CPU what stays in a core's cache, on a GPU all in flight."""


def wide_logit_rows(vocabulary: int, device: str) -> int:
    """Rows whose loss is computed at once."""
    return max(1, WIDE_LOGITS_AT_ONCE[device] // vocabulary)


_DRAWN_LOGITS_AT_ONCE = {"cuda": 1 << 25, "cpu": 1 << 17}


def drawn_rows(vocabulary: int, device: str) -> int:
    """Rows of logits whose distribution is made at once: sorting it takes some 30 bytes a logit."""
    return max(1, _DRAWN_LOGITS_AT_ONCE[device] // vocabulary)


HEAD_WEIGHTS_OF_A_THREAD = 1 << 18
"""Weights of the head, for each thread, that several rows are multiplied by at once in fp32 on a CPU. MKL copies those
of a product, up to 4 MiB for each thread, and is no quicker with more."""

COMPARED_AT_ONCE = 1 << 18
"""Logits of several rows whose largest are found at once, on a CPU: what stays in the cores' caches."""

WEIGHTS_AT_ONCE = {"cuda": 1 << 24, "cpu": 1 << 19}
"""NF4 weights that are unpacked in one piece: what stays in a core's cache, and on a GPU 64 MiB of indices."""

ELEMENTS_AT_ONCE = {"cuda": 1 << 24, "cpu": 1 << 17}
"""Elements of 8-bit optimizer state that are updated in one piece."""

NORMED_AT_ONCE = {"cuda": 1 << 22, "cpu": 1 << 19}
"""Weights of which DoRA makes W + s B A in fp32 at once, to take the norms of its rows."""
