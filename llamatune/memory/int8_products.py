"""Memory of products with int8 weights in generation on a CPU: buffers of casts, and x in digits. No torch."""

from __future__ import annotations

from llamatune.memory.model_sizes import ModelSizes
from llamatune.processor import casts_by_onednn, multiplies_int8_blocks
from llamatune.shapes.llama_config import GATE_UP_MODULES, LINEAR_MODULES, QKV_MODULES
from llamatune.shapes.tile_sizes import CAST_AT_ONCE, CODES_IN_BLOCKS, ROWS_OF_DIGITS, WIDE_DIGITS, rows_cast_by_onednn


def applies(z: ModelSizes) -> bool:
    """Whether there are such products: in bf16."""
    return z.dtype == "int8" and not z.cuda and z.c == 2


def in_blocks(z: ModelSizes, name: str) -> bool:
    """Whether the codes of a matrix, joined or not, are held in oneDNN's layout."""
    return applies(z) and multiplies_int8_blocks() and z.config.elements_of_product(name) >= CODES_IN_BLOCKS


def rearranged(z: ModelSizes) -> int:
    """The largest codes that are held twice while they are rearranged."""
    return max((z.config.elements_of_product(name) for name in LINEAR_MODULES if in_blocks(z, name)), default=0)


def buffers(z: ModelSizes) -> int:
    """What matrices are unpacked into, or cast to a part or several at a time; it stays."""
    if not applies(z):
        return z.unpacking
    in_rows = [name for name in LINEAR_MODULES if not in_blocks(z, name)]
    unpacked = max((z.c * z.count(name) for name in in_rows), default=0)
    together = [sum(map(z.count, group)) for group in (GATE_UP_MODULES, QKV_MODULES) if group[0] in in_rows]
    if casts_by_onednn():
        return max(unpacked, z.c * min(rows_cast_by_onednn(z.D) * z.D, max(together, default=0)))
    return max(unpacked, z.c * max((count for count in together if count <= CAST_AT_ONCE), default=0))


def digits(z: ModelSizes, name: str, rows: int) -> int:
    """Beside the output of a product of so many rows by digits: x in whole units, its digits, and what each gives."""
    if not in_blocks(z, name):
        return 0
    in_ = z.config.linear_shape(name)[1]
    out, at_once = z.config.elements_of_product(name) // in_, min(rows, ROWS_OF_DIGITS)
    return at_once * ((2 + 2) * in_ + 2 * out * (4 if rows <= WIDE_DIGITS else 2))
