"""How often each row of a file with a weight is written."""

from __future__ import annotations

import hashlib
import itertools
import math
from array import array
from collections.abc import Sequence


def copies_of(rows: Sequence[int], weight: float, seed: int, file: int) -> array[int]:
    """How often each of ``rows`` (row numbers, in ascending order) of the ``file``-th file is written.

    The whole part of ``weight`` is for every row; its fraction is a share of the rows, at least one where there is no
    whole part, chosen by (seed, file, row number). A larger share contains a smaller one. Entries of one number, the
    windows of a document, are together.
    """
    whole = math.floor(weight)
    ranks = array("Q", (_rank(number, seed, file) for number, _ in itertools.groupby(rows)))
    count = round((weight - whole) * len(ranks))
    if not whole and not count:
        count = min(1, len(ranks))
    if not count:
        return array("H", [whole]) * len(rows)
    highest = sorted(ranks)[count - 1]
    return array("H", (whole + (_rank(number, seed, file) <= highest) for number in rows))


def _rank(number: int, seed: int, file: int) -> int:
    digest = hashlib.blake2b(f"{file}:{number}".encode(), key=str(seed).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
