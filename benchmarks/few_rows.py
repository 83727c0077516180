"""Compares two ways of a bf16 product of few rows on a CPU: ``python benchmarks/few_rows.py``.

x W^T as torch computes it, and as ``few_rows_linear`` does (W x^T with its transposition, or without oneDNN),
alternating; a ratio above 1: the second is faster. The matrices of a shape are used in turn, so that they are read from
memory as in decoding.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model.products import few_rows_linear, suits_few_rows

SHAPES = ((288, 288), (768, 288), (1024, 1024), (4096, 1024), (32000, 1024))
ROWS = (1, 2, 8, 16, 32, 64)
BYTES = 256 << 20
"""Of all matrices of a shape."""
ROUNDS = 7


def seconds(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, matrices: list[Tensor]) -> float:
    """Of the products of ``x`` with every matrix."""
    started = time.perf_counter()
    for W in matrices:
        product(x, W)
    return time.perf_counter() - started


def main() -> None:
    """The table."""
    sys.stdout.write("| (out, in) | rows | x W^T, GB/s | ratio |\n|---|---|---|---|\n")
    with torch.inference_mode():
        for out_features, in_features in SHAPES:
            size = 2 * out_features * in_features
            matrices = [torch.randn(out_features, in_features).bfloat16() for _ in range(min(64, BYTES // size))]
            for rows in ROWS:
                x = torch.randn(rows, in_features).bfloat16()
                if not suits_few_rows(x, matrices[0]):
                    continue
                times = [(seconds(F.linear, x, matrices), seconds(few_rows_linear, x, matrices)) for _ in range(ROUNDS)]
                ratios = [one / other for one, other in times[1:]]
                speed = len(matrices) * size / statistics.median(one for one, _ in times[1:]) / 1e9
                ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                sys.stdout.write(f"| ({out_features}, {in_features}) | {rows} | {speed:.1f} | {ratio} |\n")


if __name__ == "__main__":
    main()
