"""Matrix products that add, scale and widen on the way, as a GPU does at no cost.

On a CPU these are steps after the product, in one order from release to release: a run continues to the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def at_once(x: Tensor) -> bool:
    """Whether what can be done with a product of ``x`` in one kernel is: on a GPU."""
    return x.is_cuda


def product(a: Tensor, b: Tensor, out: Tensor | None = None, added: Tensor | None = None) -> Tensor:
    """a b of matrices, plus what is ``added``, a matrix or a row for all rows, in ``out`` or in a new tensor."""
    return torch.mm(a, b, out=out) if added is None else torch.addmm(added, a, b, out=out)


def product_back(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a b of matrices in ``out``, or added to what is there, or in a new tensor."""
    if not add:
        return torch.mm(a, b, out=out)
    assert out is not None
    return out.addmm_(a, b)


def scaled_product(a: Tensor, b: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """scale · a b in ``dtype``, by default a's own, or fp32."""
    dtype = a.dtype if dtype is None else dtype
    if not at_once(a):
        y = (a @ b).to(dtype)
        return y if scale == 1 else y.mul_(scale)
    y = torch.empty(len(a), b.shape[1], dtype=dtype, device=a.device)
    if dtype == a.dtype:
        return y.addmm_(a, b, beta=0, alpha=scale)
    return torch.addmm(y, a, b, out_dtype=dtype, beta=0, alpha=scale)
