"""Compares two ways of a product of few rows on a CPU: ``python benchmarks/few_rows.py [--held int8]``.

In bf16, x W^T as torch computes it, and as ``few_rows_linear`` does (W x^T with its transposition, or without oneDNN).
In int8, by unpacking and by digits. They alternate; a ratio above 1: the second is faster. The
matrices of a shape are used in turn, so that they are read from memory as in decoding.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model.int8 import Int8Weight
from llamatune.model.packed_weight import PackedWeight, Scratch
from llamatune.model.products import few_rows_linear, suits_few_rows

SHAPES = ((288, 288), (768, 288), (1024, 1024), (4096, 1024), (1024, 4096), (32000, 1024))
ROWS = (1, 2, 8, 9, 16, 32, 64)
BYTES = 256 << 20
"""Of all matrices of a shape."""
ROUNDS = 7


def seconds(product: Callable[[Tensor, Any], Tensor], x: Tensor, matrices: list[Any]) -> float:
    """Of the products of ``x`` with every matrix."""
    started = time.perf_counter()
    for W in matrices:
        product(x, W)
    return time.perf_counter() - started


def by_unpacking(x: Tensor, W: Int8Weight) -> Tensor:
    """x W^T."""
    return PackedWeight.product(W, x)


def by_digits(x: Tensor, W: Int8Weight) -> Tensor:
    """x W^T."""
    return W.product(x)


def ways(held: str, out_features: int, in_features: int) -> tuple[Any, Any, Any, list[Any]]:
    """The first, the second, whether the second is used for some x, and matrices."""
    count = min(64, BYTES // ((2 if held == "bfloat16" else 1) * out_features * in_features))
    drawn = (torch.randn(out_features, in_features).bfloat16() for _ in range(count))
    if held == "bfloat16":
        matrices: list[Any] = list(drawn)
        return F.linear, few_rows_linear, functools.partial(suits_few_rows, W=matrices[0]), matrices
    scratch = Scratch()
    packed = [Int8Weight.quantize(W, scratch) for W in drawn]
    return by_unpacking, by_digits, lambda x: not packed[0].multiplies_codes(x), packed


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held", choices=("bfloat16", "int8"), default="bfloat16")
    held = parser.parse_args().held
    sys.stdout.write("| (out, in) | rows | the first, GB/s | ratio |\n|---|---|---|---|\n")
    with torch.inference_mode():
        for out_features, in_features in SHAPES:
            first, second, suits, matrices = ways(held, out_features, in_features)
            size = (2 if held == "bfloat16" else 1) * out_features * in_features
            for rows in ROWS:
                x = torch.randn(rows, in_features).bfloat16()
                if not suits(x):
                    continue
                times = [(seconds(first, x, matrices), seconds(second, x, matrices)) for _ in range(ROUNDS)]
                ratios = [one / other for one, other in times[1:]]
                speed = len(matrices) * size / statistics.median(one for one, _ in times[1:]) / 1e9
                ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                sys.stdout.write(f"| ({out_features}, {in_features}) | {rows} | {speed:.1f} | {ratio} |\n")


if __name__ == "__main__":
    main()
