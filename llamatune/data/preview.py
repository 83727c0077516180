"""Preview of a prepared directory: the tokens of its first rows, and which of them are trained."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from llamatune.formats.prepared import SplitFile, split_path
from llamatune.tokenizers.tokenizer import Tokenizer


def preview_rows(directory: Path, tokenizer: Tokenizer, count: int) -> list[dict[str, Any]]:
    """The first ``count`` training rows, read back from what was written to ``directory``.

    Each has its number in the input files, counted from 1, as ``row``, and ``tokens`` with ``id``, ``piece``,
    ``trained``: whether the token is a target, and ``special``: it is a special token, not text that looks like one.
    """
    special_ids = set(tokenizer.special_ids.values())
    split = SplitFile(split_path(directory, "train"))
    shown = min(count, len(split))
    offsets, numbers = split.row_starts()[: shown + 1], split.column("source_rows", 0, shown)
    rows = []
    for number, (begin, end) in zip(numbers, itertools.pairwise(offsets), strict=True):
        ids, mask = split.column("input_ids", begin, end), split.column("loss_mask", begin, end)
        tokens = [
            {
                "id": token_id,
                "piece": tokenizer.piece(token_id),
                "trained": bool(trained),
                "special": token_id in special_ids,
            }
            for token_id, trained in zip(ids, mask, strict=True)
        ]
        rows.append({"row": number, "tokens": tokens})
    return rows
