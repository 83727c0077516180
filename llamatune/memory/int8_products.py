"""Memory of products with int8 weights in generation on a CPU: buffers of casts, and x in digits. No torch."""

from __future__ import annotations

from llamatune.memory.model_sizes import ModelSizes
from llamatune.processor import casts_by_onednn, gains_by_onednn_layout
from llamatune.shapes.int8_products import (
    CAST_AT_ONCE,
    DIGITS_TOGETHER,
    LEAST_IN_ONEDNN_LAYOUT,
    ROWS_OF_DIGITS,
    WIDE_DIGITS,
    rows_cast_by_onednn,
)
from llamatune.shapes.llama_config import GATE_UP_MODULES, LINEAR_MODULES, QKV_MODULES


def applies(z: ModelSizes) -> bool:
    """Whether there are such products: in bf16."""
    return z.dtype == "int8" and not z.cuda and z.c == 2


def in_onednn_layout(z: ModelSizes, name: str) -> bool:
    """Whether the codes of a matrix, joined or not, are held in oneDNN's layout, if that has exact products here."""
    return applies(z) and gains_by_onednn_layout() and z.config.elements_of_product(name) >= LEAST_IN_ONEDNN_LAYOUT


def rearranged(z: ModelSizes) -> int:
    """The largest codes that are held twice while they are rearranged."""
    return max((z.config.elements_of_product(name) for name in LINEAR_MODULES if in_onednn_layout(z, name)), default=0)


def buffers(z: ModelSizes) -> int:
    """What matrices are unpacked into, or cast to a part or several at a time; it stays."""
    if not applies(z):
        return z.unpacking
    in_rows = [name for name in LINEAR_MODULES if not in_onednn_layout(z, name)]
    unpacked = [name for name in LINEAR_MODULES if name in in_rows or _takes_norms(z, name)]
    room = z.c * max(map(z.count, unpacked), default=0)
    together = [sum(map(z.count, group)) for group in (GATE_UP_MODULES, QKV_MODULES) if group[0] in in_rows]
    if casts_by_onednn():
        return max(room, z.c * min(rows_cast_by_onednn(z.D) * z.D, max(together, default=0)))
    return max(room, z.c * max((count for count in together if count <= CAST_AT_ONCE), default=0))


def _takes_norms(z: ModelSizes, name: str) -> bool:
    """Whether DoRA takes the norms of the rows, for which the matrix is unpacked."""
    return z.dora and name in z.targets


def digits(z: ModelSizes, name: str, rows: int) -> int:
    """Beside the output of a product of so many rows by digits: x in whole units, its digits, and what these give.

    Or the codes in rows that DoRA takes the norms of.
    """
    if not in_onednn_layout(z, name):
        return 0
    elements, in_ = z.config.elements_of_product(name), z.config.linear_shape(name)[1]
    products = (2 if rows <= DIGITS_TOGETHER else 1) * elements // in_ * (4 if rows <= WIDE_DIGITS else 2)
    by_digits = min(rows, ROWS_OF_DIGITS) * max(6 * in_, 4 * in_ + products)
    return max(by_digits, elements if _takes_norms(z, name) else 0)
