"""Times CPU products and attention of new shapes against shapes seen before: ``python benchmarks/new_shapes.py``.

Each line has the median milliseconds of the first call with a number of rows that was not used yet, and of the fastest
later call with the same number.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from llamatune.model.attention_in_fp32 import attend_in_fp32

HIDDEN, FEED_FORWARD, VOCABULARY, HEADS = 512, 1376, 32000, 8
ROWS = (601, 643, 705, 783, 827, 911, 1027)
LENGTHS = (61, 77, 93, 101, 115, 131, 163)
CALLS = 6


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - started)


def first_and_later(work: Callable[[int], Callable[[], object]], sizes: tuple[int, ...]) -> tuple[float, float]:
    """Medians over the sizes of the first call, and of the fastest later one."""
    times = [[milliseconds(call) for _ in range(CALLS)] for call in map(work, sizes)]
    return statistics.median(one[0] for one in times), statistics.median(min(one[1:]) for one in times)


def product(columns: int, dtype: torch.dtype, back: bool) -> Callable[[int], Callable[[], object]]:
    """x W^T, or with ``back`` the product with W that its gradient needs."""
    weight = torch.randn(columns, HIDDEN).to(dtype)
    matrix = weight if back else weight.T

    def work(rows: int) -> Callable[[], object]:
        x = torch.randn(rows, len(matrix)).to(dtype)
        return lambda: x @ matrix

    return work


def attention(kernel: Callable[..., torch.Tensor], dtype: torch.dtype) -> Callable[[int], Callable[[], object]]:
    """Forward and backward."""

    def work(tokens: int) -> Callable[[], object]:
        leaves = [torch.randn(1, HEADS, tokens, HIDDEN // HEADS).to(dtype).requires_grad_() for _ in ("q", "k", "v")]
        return lambda: torch.autograd.grad(kernel(*leaves).sum(), leaves)

    return work


def main() -> None:
    """Print the table."""
    causal = partial(F.scaled_dot_product_attention, is_causal=True)
    cases = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for kind, columns in (("hidden", HIDDEN), ("feed-forward", FEED_FORWARD), ("vocabulary", VOCABULARY)):
            cases[f"{kind}, {name}"] = product(columns, dtype, back=False), ROWS
            cases[f"{kind}, back, {name}"] = product(columns, dtype, back=True), ROWS
        cases[f"attention, {name}"] = attention(causal, dtype), LENGTHS
    cases["attention, bf16 tensors in fp32"] = attention(attend_in_fp32, torch.bfloat16), LENGTHS
    for name, (work, sizes) in cases.items():
        first, later = first_and_later(work, sizes)
        sys.stdout.write(f"{name:34} first {first:8.2f}  later {later:8.2f}  ratio {first / later:5.1f}\n")


if __name__ == "__main__":
    main()
