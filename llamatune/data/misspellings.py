"""Whether a key is a misspelt name of a field."""

from __future__ import annotations

import functools


@functools.lru_cache(maxsize=4096)
def within_edits(left: str, right: str, most: int) -> bool:
    """Whether ``most`` insertions, deletions, substitutions or swaps of neighbours suffice (Damerau-Levenshtein)."""
    if abs(len(left) - len(right)) > most or len({*right} - {*left}) > most:
        return False  # the letters tell most pairs at once
    if left[:1] == right[:1]:
        return not left or within_edits(left[1:], right[1:], most)
    return most > 0 and (
        within_edits(left[1:], right, most - 1)
        or within_edits(left, right[1:], most - 1)
        or within_edits(left[1:], right[1:], most - 1)
        or (left[:2] == right[1::-1] and within_edits(left[2:], right[2:], most - 1))
    )
