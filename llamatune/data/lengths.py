"""How long prepared samples are, read without torch."""

from __future__ import annotations

import itertools
from pathlib import Path

from llamatune.errors import DataError
from llamatune.formats.safetensors import read_header
from llamatune.safe_reading import open_regular


def read_lengths(prepared: Path) -> tuple[list[int], list[int]]:
    """Tokens and target tokens of each training sample of a directory that ``prepare-data`` wrote."""
    path = prepared / "train.safetensors"
    entries, _ = read_header(path, DataError)
    found = []
    with open_regular(path, DataError) as file:
        for name, dtype in (("offsets", "I64"), ("loss_mask", "U8")):
            if name not in entries or entries[name].dtype != dtype:
                raise DataError("not a file that prepare-data wrote", path, "prepare the data again")
            file.seek(entries[name].begin)
            found.append(file.read(entries[name].end - entries[name].begin))
    starts, mask = memoryview(found[0]).cast("q").tolist(), found[1]
    spans = list(itertools.pairwise(starts))
    if not spans or starts[0] != 0 or starts[-1] != len(mask) or any(begin >= end for begin, end in spans):
        raise DataError("row offsets do not fit the tokens", path, "prepare the data again")
    return [end - begin for begin, end in spans], [mask.count(1, begin, end) for begin, end in spans]
