"""Files of rows with weights, as ``rows.jsonl:0.5``."""

from __future__ import annotations

import os
import re
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
