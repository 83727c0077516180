"""Validation split: the choice of the rows that are held out, by seed and content."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter


def held_out_rows(keys: array[int], fraction: float, seed: int) -> bytes:
    """One byte for each row, 1 if it is held out: a function of (keys, fraction, seed).

    Rows with equal keys are on the same side, so that no validation row is trained on. About ``fraction`` of the rows
    are held out; if two rows differ, each side has at least one.
    """
    groups = Counter(keys)
    if len(groups) < 2:
        return bytes(len(keys))
    target_rows = min(max(1, round(fraction * len(keys))), len(keys) - 1)
    order = sorted(groups, key=lambda key: _rank(key, seed))
    chosen, rows = set[int](), 0
    for key in order:
        if rows + groups[key] <= target_rows:
            chosen.add(key)
            rows += groups[key]
    if not chosen:  # each row has more copies than the fraction allows
        chosen.add(min(order, key=lambda key: groups[key]))
    return bytes(key in chosen for key in keys)


def _rank(key: int, seed: int) -> bytes:
    return hashlib.blake2b(key.to_bytes(8, "little"), key=str(seed).encode(), digest_size=16).digest()
