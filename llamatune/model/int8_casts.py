"""Matrix products in bf16 with int8 weights, which oneDNN (mkldnn) casts: for long prompts on a CPU.

oneDNN casts codes two to three times as fast as torch, which rounds each. torch passes it a matrix in another dtype
than x only where x is in oneDNN's own layout. torch's documentation does not say so, so each process tries it once.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.processor import casts_by_onednn
from llamatune.shapes.int8_products import rows_cast_by_onednn


def casts_codes() -> bool:
    """Whether products are computed so on this machine."""
    return casts_by_onednn() and _is_possible()


@functools.cache
def _is_possible() -> bool:
    """Whether such a product is computed at all, and gives every code."""
    codes = torch.arange(-127, 128, dtype=torch.int8).expand(2, -1).contiguous()
    x = torch.eye(255, dtype=torch.bfloat16)
    try:
        products = F.linear(x.to_mkldnn(), codes).to_dense()
    except RuntimeError:  # this torch refuses it, or is built without oneDNN
        return False
    return torch.equal(products, codes.T.to(x.dtype))


def product_with_codes(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x (N, in) W^T of codes (out, in) and scales (out,): (N, out) in bf16, rounded before and after the scales.

    Parts of W are multiplied one after the other, so that what they are cast to stays in the cache.
    """
    x, rows = x.to_mkldnn(), rows_cast_by_onednn(codes.shape[1])
    if rows >= len(codes):
        return F.linear(x, codes).to_dense().mul_(scales)
    y = scales.new_empty(len(x), len(codes))
    parts = torch.split(codes, rows), torch.split(scales, rows), torch.split(y, rows, dim=1)
    for part, scale, out in zip(*parts, strict=True):
        torch.mul(F.linear(x, part).to_dense(), scale, out=out)
    return y
