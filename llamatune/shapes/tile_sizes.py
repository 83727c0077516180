"""How much is computed at once: tile sizes and portions that bound the memory in flight, and least sizes. No torch.

The model computes by them and the memory plan counts by them. Portions differ by device: ``cuda`` or ``cpu``.
"""

from __future__ import annotations

TILE_TOKENS = 2048
"""Rows that a fused block has in flight where nothing of them is kept."""

SHORT_TOKENS = 256
"""Longest sample of bf16 whose attention is computed in fp32 on a CPU: it is quicker than the kernel in bf16 where a
length is new, about twice at 120 tokens. Where code for a length is compiled, bf16 is quicker, 2 to 5 times."""

WIDENED_AT_ONCE = 1 << 17
"""Numbers of keys, and as many of values, that a CPU casts to fp32 at once for one query: they stay in its caches."""

LEAST_BY_PRODUCTS = 1 << 18
"""Least numbers of keys in fp32 of which a step of decoding on a CPU computes attention by products of matrices."""

KEYS_TO_SAVE = 1 << 16
"""Numbers of keys that are not read where a CPU computes attention of shorter rows by a further call: about as many as
it reads in the time that a call takes."""

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

CAST_AT_ONCE = 1 << 24
"""Most codes in int8 that torch casts at once for a product of joined matrices; more are cast matrix by matrix."""

_CAST_BY_ONEDNN = 1 << 21
"""Codes in int8 that oneDNN casts at once, about: 4 MiB in bf16, which stay in the last cache."""
_ROWS_OF_A_TILE = 64


def rows_cast_by_onednn(columns: int) -> int:
    """Rows of a matrix in int8 that are cast at once: whole tiles of oneDNN's kernel."""
    return -(-_CAST_BY_ONEDNN // (columns * _ROWS_OF_A_TILE)) * _ROWS_OF_A_TILE


LEAST_IN_ONEDNN_LAYOUT = 3 << 20
"""Least codes in int8 of a matrix, or of joined ones, that generation holds in oneDNN's layout: prompts and batches
are quicker from one million on, one row is slower up to about ten, since it is written in digits. With three million
both are quicker than in bf16 by transformers, for 0.5 billion parameters."""

ROWS_OF_DIGITS = 512
"""Of x, that are multiplied by such a matrix at once: with fewer it is read more often, and with more each takes as
long and more room."""

WIDE_DIGITS, DIGITS_TOGETHER = 64, 128
"""Most rows of x whose products with both digits are added in fp32, and most with which one call gives both, so that
the matrix is read once. What is not added in fp32 is rounded to bf16 first, which takes less time."""

ELEMENTS_AT_ONCE = {"cuda": 1 << 24, "cpu": 1 << 17}
"""Elements of 8-bit optimizer state that are updated in one piece."""

NORMED_AT_ONCE = {"cuda": 1 << 22, "cpu": 1 << 19}
"""Weights of which DoRA makes W + s B A in fp32 at once, to take the norms of its rows."""
