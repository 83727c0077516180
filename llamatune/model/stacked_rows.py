"""Rows of several adapters in one product with a matrix, where a trial shows that each row keeps its bits.

A large product costs less than small ones of the same rows, but it may add in another order. The order depends on
shapes and alignment alone. So a trial multiplies copies of one row: where products of two sizes give each copy the same
bits, rows may be moved from one to the other.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

MOST_ROWS = 128
"""Of one adapter. More rows gain less than a tenth."""
_MOST_STACKED, _STEP = 512, 32
"""Stacks are filled up to a multiple of ``_STEP``, so that few sizes have to be tried."""
_ALIGNED = 64
"""Bytes of a tensor of its own."""
_MOST_FAILURES = 3
"""Trials of a shape of matrix that may fail, before no more are made: they take time."""


class StackedRows:
    """Multiplies rows together; remembers what trials showed. For fp32 on a CPU."""

    def __init__(self) -> None:
        self._keeps_bits: dict[tuple[object, ...], bool] = {}
        self._failures: Counter[tuple[object, ...]] = Counter()

    def suit(self, x: Tensor, B: Tensor) -> bool:
        """Whether rows x (N, in) may be multiplied by B (in, out) together with others."""
        few = len(x) <= MOST_ROWS and self._failures[_kind(B)] < _MOST_FAILURES
        return few and x.dtype == torch.float32 and x.device.type == "cpu" and _is_like_new(x)

    def product(self, xs: list[Tensor], B: Tensor, outs: list[Tensor | None]) -> list[Tensor] | None:
        """x B of each x, with B (in, out), in its ``out`` or a new tensor, as ``torch.mm`` gives it; None: apart."""
        count, filled = sum(map(len, xs)), -(-sum(map(len, xs)) // _STEP) * _STEP
        suits = len(xs) > 1 and filled <= _MOST_STACKED and all(self.suit(x, B) for x in xs)
        suits = suits and all(out is None or _is_like_new(out) for out in outs)
        if not suits or not all(self._keeps(rows, B) for rows in {filled, *map(len, xs)}):
            return None
        stack = xs[0].new_empty(filled, B.shape[0])
        torch.cat(xs, out=stack[:count])
        stack[count:] = 0
        made = torch.split(torch.mm(stack, B)[:count], [len(x) for x in xs])
        # No views of the stack: the order of addition of what follows may depend on their alignment.
        return [y.clone() if out is None else out.copy_(y) for y, out in zip(made, outs, strict=True)]

    def _keeps(self, rows: int, B: Tensor) -> bool:
        """Whether a product of so many rows gives each the bits that it has in one of ``_STEP`` rows."""
        key = (rows, *_kind(B))
        if key not in self._keeps_bits:
            row = torch.randn(1, B.shape[0], generator=torch.Generator().manual_seed(rows))
            expected, found = (torch.mm(row.repeat(count, 1), B) for count in (_STEP, rows))
            self._keeps_bits[key] = torch.equal(found, expected[:1].expand_as(found))
            self._failures[_kind(B)] += not self._keeps_bits[key]
        return self._keeps_bits[key]


def _kind(B: Tensor) -> tuple[object, ...]:
    """All of a matrix that the order of addition depends on."""
    return B.shape, B.stride(), torch.get_num_threads()


def _is_like_new(x: Tensor) -> bool:
    return x.is_contiguous() and x.data_ptr() % _ALIGNED == 0
