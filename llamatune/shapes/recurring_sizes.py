"""Numbers of rows that recur, which 16-bit matrix products on a CPU are filled up to. No torch.

oneDNN compiles code for each new shape of such a product, which takes 3 to 30 ms, and keeps that of about a thousand.
Rows without padding have a new number of tokens nearly every time.
"""

from __future__ import annotations

from llamatune.shapes.tile_sizes import LOGIT_BYTES_AT_ONCE

_TILE = 16
"""Rows of a tile of AMX."""


def filled_up(rows: int, device: str, element_bytes: int, has_amx: bool = True) -> int:
    """Rows of a product, ``element_bytes`` each of its elements, on ``cuda`` or ``cpu``.

    On a CPU in 16 bits the next multiple of 16, and from 512 on the next of 16 sizes between two powers of two: at most
    6 % more. Without AMX these are the sizes below 512, too. Otherwise ``rows``.
    """
    if device != "cpu" or element_bytes >= 4:
        return rows
    step = max(_TILE if has_amx else 1, 1 << max(rows.bit_length() - 5, 0))
    return -(-rows // step) * step


def logit_rows(vocabulary: int, device: str, element_bytes: int) -> int:
    """Rows whose logits are in flight together; on a CPU in 16 bits a number that recurs."""
    rows = max(1, LOGIT_BYTES_AT_ONCE[device] // (vocabulary * element_bytes))
    return rows if filled_up(rows, device, element_bytes) == rows else 1 << (rows.bit_length() - 1)
