"""Products with int8 matrices on a CPU: how many codes are cast at once, and which are in oneDNN's layout. No torch.

The model computes by these sizes and the memory plan counts by them.
"""

from __future__ import annotations

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
are quicker from two million on, one row is slower up to about ten, since it is written in digits. With three million
both are quicker than in bf16 by transformers, for 0.5 billion parameters."""

ROWS_OF_DIGITS = 512
"""Of x, that are multiplied by such a matrix at once: with fewer it is read more often, and with more each takes as
long and more room."""

WIDE_DIGITS, DIGITS_TOGETHER = 64, 128
"""Most rows of x whose products with both digits are added in fp32, and most with which one call gives both, so that
the matrix is read once. What is not added in fp32 is rounded to bf16 first, which takes less time."""
