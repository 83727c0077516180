"""Compares attention of one query for each head on a CPU with torch's kernel, as a step of decoding has it.

``python benchmarks/attention_of_one_query.py``. Several layers have a cache each, used in turn, and rows of other
lengths are masked. Both alternate; a ratio above 1: ``attend`` is faster. ``--dtype`` of keys and values.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model.attention import added, attend

HEADS = ((6, 6, 48), (16, 8, 64), (14, 2, 64), (32, 32, 128))
"""Of queries, of keys, and their size."""
SIZES = ((1, 110), (1, 1000), (16, 110), (16, 400), (57, 400))
"""Rows and keys."""
BYTES, LARGEST = 256 << 20, 1 << 30
"""Of the caches of all layers, and the most of one that is measured."""
ROUNDS = 7
Layers = list[tuple[Tensor, Tensor]]


def seconds(way: Callable[..., Tensor], q: Tensor, layers: Layers, mask: Tensor | None) -> float:
    """Of attention in every layer."""
    started = time.perf_counter()
    for k, v in layers:
        way(q, k, v, mask)
    return time.perf_counter() - started


def by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As transformers calls it."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def by_llamatune(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As a block calls it."""
    return attend(q, k, v, mask, None)


def caches(rows: int, keys: int, heads: tuple[int, int, int], dtype: torch.dtype) -> Layers:
    """Of so many layers that they are read from memory; none if one is too large."""
    _, of_keys, size = heads
    one = 2 * rows * of_keys * keys * size * dtype.itemsize
    drawn = (torch.randn(2, rows, of_keys, keys, size, dtype=dtype) for _ in range(max(2, min(24, BYTES // one))))
    return [(k, v) for k, v in drawn] if one <= LARGEST else []


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    dtype = getattr(torch, parser.parse_args().dtype)
    sys.stdout.write("| heads of q, of k, size | rows | keys | torch's, µs | ratio |\n|---|---|---|---|---|\n")
    with torch.inference_mode():
        for heads in HEADS:
            for rows, keys in SIZES:
                layers = caches(rows, keys, heads, dtype)
                if not layers:
                    continue
                q = torch.randn(rows, heads[0], 1, heads[2], dtype=dtype)
                seen = torch.arange(keys) < torch.randint(keys // 3, keys + 1, (rows, 1))
                mask = None if rows == 1 else added(seen[:, None, None], dtype)
                ways = by_torch, by_llamatune
                times = [[seconds(way, q, layers, mask) for way in ways] for _ in range(ROUNDS + 1)][1:]
                ratios = [torchs / ours for torchs, ours in times]
                each = statistics.median(torchs for torchs, _ in times) / len(layers) * 1e6
                ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                sys.stdout.write(f"| {heads} | {rows} | {keys} | {each:.0f} | {ratio} |\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
