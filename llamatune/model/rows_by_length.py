"""Rows of a batch in groups by length, so that attention in a step of decoding reads little padding of keys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

KEYS_TO_SAVE = 1 << 16
"""Numbers of keys that are not read where a CPU computes attention of shorter rows by a further call: about as many as
it reads in the time that a call takes."""

Groups = Sequence[tuple[int, int]]
"""(rows, keys) of each group: so many rows, one after another, the longest of which has so many keys."""


def groups_of_rows(lengths: Sequence[int], least: int) -> Groups:
    """Rows of these lengths in groups, each split again where that saves most keys, if it saves ``least``."""
    rows = len(lengths)
    before, behind = list(accumulate(lengths, max)), list(accumulate(reversed(lengths), max))[::-1]
    longest = before[-1]
    at = range(1, rows)
    saved = [first * (longest - before[first - 1]) + (rows - first) * (longest - behind[first]) for first in at]
    most = max(saved, default=0)
    if most < max(1, least):
        return [(rows, longest)]
    first = at[saved.index(most)]
    return [*groups_of_rows(lengths[:first], least), *groups_of_rows(lengths[first:], least)]
