"""Preview of a prepared directory: fields, text and tokens of its first rows, and what of them is trained."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamatune.data.row_formats import FORMATS
from llamatune.data.templates import Template
from llamatune.formats.manifest import Manifest
from llamatune.formats.prepared import SplitFile, read_prepared_manifest, split_path
from llamatune.tokenizers.tokenizer import Tokenizer


def preview_rows(directory: Path, tokenizer: Tokenizer, count: int) -> list[dict[str, Any]]:
    """The first ``count`` training rows, read back from what was written to ``directory``.

    Each has its number in the input files, counted from 1, as ``row``. ``fields`` are those of the row by name, the
    answer last, as they were before the template; empty where they cannot be told: of chats and texts, and of rows that
    were cut within the prompt. ``text`` is the whole in pieces with ``text``, ``trained`` and ``special``. ``tokens``
    have ``id``, ``piece``, ``trained``: whether the token is a target, and ``special``: it is a special token, not text
    that looks like one.
    """
    special_ids = set(tokenizer.special_ids.values())
    split, manifest = SplitFile(split_path(directory, "train")), read_prepared_manifest(directory)
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
        text = _text(tokenizer, tokens)
        rows.append({"row": number, "fields": _fields(text, manifest), "text": text, "tokens": tokens})
    return rows


def _text(tokenizer: Tokenizer, tokens: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The text of ``tokens``, in pieces that are trained or not; each special token is a piece of its own."""
    ids, place = [token["id"] for token in tokens], 0
    pieces = []
    for (trained, special), group in itertools.groupby(tokens, key=lambda token: (token["trained"], token["special"])):
        found = list(group)
        if special:
            pieces += [{"text": token["piece"], "trained": trained, "special": True} for token in found]
        else:
            added = tokenizer.continuation(ids[:place], ids[place : place + len(found)])
            pieces.append({"text": added, "trained": trained, "special": False})
        place += len(found)
    return pieces


def _fields(text: Sequence[dict[str, Any]], manifest: Manifest) -> dict[str, str]:
    """The fields that the template of a row of one prompt and one answer was filled with, and the answer."""
    row_format, stored = FORMATS.get(str(manifest.facts.get("format"))), manifest.template
    if row_format is None or stored is None or not stored.get("prompt"):
        return {}
    if row_format.name == "chat" or stored.get("turn"):  # a field may hold what separates earlier turns
        return {}
    if [trained for trained, _ in itertools.groupby(piece["trained"] for piece in text)] != [False, True]:
        return {}
    prompt, answer = (
        "".join(piece["text"] for piece in text if piece["trained"] is trained and not piece["special"])
        for trained in (False, True)
    )
    template = Template.from_dict(stored)
    fields = template.fields_of(prompt) or {}
    if not fields or template.prompt_of(fields).rstrip() != prompt.rstrip():
        return {}
    return {**fields, row_format.required[-1]: answer.removeprefix(template.before_completion).lstrip(" ")}
