"""Products in bf16 with a matrix in int8, which oneDNN casts: for generation on a CPU.

oneDNN casts codes two to three times as fast as torch, which rounds each. torch hands it a matrix in another dtype than
x only where x is in oneDNN's own layout. Its documentation does not say so, so that is tried once in each process.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.processor import has_amx
from llamatune.shapes.tile_sizes import codes_rows


def casts_codes() -> bool:
    """Whether oneDNN multiplies x in bf16 by codes on this machine. With AMX it is not used: nobody measured it."""
    return not has_amx() and _is_possible()


@functools.cache
def _is_possible() -> bool:
    """Whether a product is done, and is that of the numbers."""
    is_there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not is_there or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    codes = torch.arange(-127, 128, dtype=torch.int8).expand(2, -1).contiguous()
    x = torch.eye(255, dtype=torch.bfloat16)
    try:
        products = F.linear(x.to_mkldnn(), codes).to_dense()
    except RuntimeError:
        return False
    return torch.equal(products, codes.T.to(x.dtype))


def product_with_codes(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """x (N, in) times the scaled codes (out, in), transposed: (N, out) in bf16, each product rounded and then scaled.

    Portions of the codes are multiplied one after the other, so that what they are cast to stays in the cache.
    """
    x, rows = x.to_mkldnn(), codes_rows(codes.shape[1])
    if rows >= len(codes):
        return F.linear(x, codes).to_dense().mul_(scales)
    y = scales.new_empty(len(x), len(codes))
    portions = torch.split(codes, rows), torch.split(scales, rows), torch.split(y, rows, dim=1)
    for portion, scale, out in zip(*portions, strict=True):
        torch.mul(F.linear(x, portion).to_dense(), scale, out=out)
    return y
