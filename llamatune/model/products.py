"""Matrix products: with addition, scaling and another dtype in one call, and of few rows on a CPU.

On a GPU these cost nothing. On a CPU they are steps after the product, in one order from release to release: a run
continues to the same bytes.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.processor import has_amx

_FEW_ROWS = 64
_LEAST_COLUMNS = 1024
"""Of a large matrix that torch's own kernel multiplies two rows by as fast as oneDNN's."""
_SWITCHING = threading.Lock()
"""oneDNN's switch is the process's: a thread would read it while another has it off, and leave it so."""
_TRANSPOSED_AT_ONCE = 1 << 19
"""Numbers of a product."""
LEAST_ELEMENTS = 1 << 20
"""Of a matrix from which on it is read from memory; a smaller one stays in the caches."""


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


def suits_few_rows(x: Tensor, W: Tensor, any_layout: bool = False) -> bool:
    """Whether ``few_rows_linear`` is faster than ``F.linear``: for bf16 products of generation on a CPU.

    It is for one row, and without AMX for two of most W. With AMX it is for some more, too, of a large W, for an output
    in any layout, and for x in columns. Training does not use it: the bits of a step do not depend on whether a pass is
    for gradients.
    """
    if x.dtype != torch.bfloat16 or W.dtype != x.dtype or not (x.is_cpu and torch.is_inference_mode_enabled()):
        return False
    rows = x.numel() // x.shape[-1]
    is_few = rows == 1 or rows <= _rows_without_onednn(W)
    if not is_few and rows <= _FEW_ROWS:
        is_few = has_amx() and (W.numel() >= LEAST_ELEMENTS or any_layout or x.stride(-1) != 1)
    return is_few and not torch.is_autocast_enabled("cpu")


def few_rows_linear(x: Tensor, W: Tensor, bias: Tensor | None = None, any_layout: bool = False) -> Tensor:
    """x W^T + bias, (..., in) -> (..., out); in ``any_layout`` it may lie in memory column after column.

    As (W x^T)^T, which oneDNN reads faster as the left factor with AMX. One row is multiplied without oneDNN where W is
    small, as its calls take longer than the product, and without AMX, where torch's own kernel reads W twice as fast,
    so that two rows take no longer there. ``benchmarks/few_rows.py`` measures both.
    """
    if x.numel() <= _rows_without_onednn(W) * x.shape[-1]:
        return _without_onednn(x, W, bias)
    rows = x.reshape(-1, x.shape[-1])
    y = torch.mv(W, rows[0])[None] if len(rows) == 1 else _by_left_factor(rows, W, any_layout)
    y = y.view(*x.shape[:-1], len(W))
    return y if bias is None else y + bias


def _rows_without_onednn(W: Tensor) -> int:
    """The most rows of x that torch's own kernel multiplies by W no slower than oneDNN's: it takes time for each."""
    is_small = W.numel() < LEAST_ELEMENTS
    if has_amx():
        return 1 if is_small else 0
    return 2 if is_small or W.shape[1] >= _LEAST_COLUMNS else 1


def _by_left_factor(x: Tensor, W: Tensor, any_layout: bool) -> Tensor:
    """(W x^T)^T; into rows of some rows of W at a time: what is transposed stays in a core's cache."""
    if any_layout or len(x) * len(W) <= _TRANSPOSED_AT_ONCE:
        return in_rows(torch.mm(W, x.T), any_layout)
    y = x.new_empty(len(x), len(W))
    portions = -(-len(x) * len(W) // _TRANSPOSED_AT_ONCE)
    for part, out in zip(W.chunk(portions), y.chunk(portions, dim=1), strict=True):
        out[None].copy_(torch.mm(part, x.T)[None].transpose(1, 2))
    return y


def in_rows(columns: Tensor, any_layout: bool) -> Tensor:
    """The transposed matrix, as a view in ``any_layout``.

    All threads copy it, which torch does with three dimensions and not with two.
    """
    return columns.T if any_layout else columns[None].transpose(1, 2).contiguous()[0]


def _without_onednn(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` by torch's own kernel."""
    with _SWITCHING:
        before = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return F.linear(x, W, bias)
        finally:
            torch._C._set_mkldnn_enabled(before)
