"""Which rows are held out for validation."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter


def held_out_rows(keys: array[int], fraction: float, seed: int) -> bytearray:
    """One byte for each row, 1 if it is held out: a function of (keys, fraction, seed) alone.

    Rows with equal keys fall on the same side, so that no validation row was trained on. About ``fraction`` of the
    rows is held out, and at least one on each side as long as there are two different rows.
    """
    groups = Counter(keys)
    held = bytearray(len(keys))
    if len(groups) < 2:
        return held
    wanted = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    order = sorted(groups, key=lambda key: _rank(key, seed))
    chosen: set[int] = set()
    rows = 0
    for key in order:
        if rows + groups[key] <= wanted:
            chosen.add(key)
            rows += groups[key]
    if not chosen:  # every row has more copies than were asked for
        chosen.add(min(order, key=lambda key: groups[key]))
    for index, key in enumerate(keys):
        held[index] = key in chosen
    return held


def _rank(key: int, seed: int) -> bytes:
    return hashlib.blake2b(key.to_bytes(8, "little"), key=str(seed).encode(), digest_size=16).digest()
