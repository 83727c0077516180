"""Files of rows with weights, as ``rows.jsonl:0.5``, and how often each row of such a file is written."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamatune.errors import SpecError

LARGEST_WEIGHT = 1000
_WEIGHTED = re.compile(r"(.+):([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)", re.DOTALL)


@dataclass(frozen=True)
class RowInput:
    """A file of rows. ``weight``: the share of its rows that is trained, or how often each is."""

    path: Path
    weight: float = 1.0


def row_input(given: Path) -> RowInput:
    """A file, or a file with its weight behind a colon. A name that exists as it stands is a file.

    Raises:
        SpecError: the weight is not above 0, or too large.
    """
    match = None if os.path.lexists(given) else _WEIGHTED.fullmatch(str(given))
    if match is None:
        return RowInput(given)
    weight = float(match[2])
    if not 0 < weight <= LARGEST_WEIGHT:
        todo = f"it must be above 0 and at most {LARGEST_WEIGHT:,}"
        raise SpecError(f"the weight of {match[1]} is {match[2]}", None, todo)
    return RowInput(Path(match[1]), weight)


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
