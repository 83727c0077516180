"""The definition that the ``tokenizers`` library gets of a ``tokenizer.json``: without what cuts or pads a text.

Special tokens have other names in it, so that no text is taken for one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.tokenizers.added_tokens import AddedToken

HIDDEN = "\ue000llamatune special token "
"""What special tokens are called in the library, before their id; a random number follows, so that no text has it."""


def library_definition(raw: dict[str, Any], added: list[AddedToken], specials: Mapping[str, int], path: Path) -> str:
    """The definition for the library: without what would cut, pad or add to a text, and with special tokens hidden."""

    def name(text: str) -> str:
        return f"{HIDDEN}{specials[text]}" if text in specials else text

    model = dict(raw["model"])
    if isinstance(model["vocab"], dict):
        model["type"] = "BPE"
        model["merges"] = _merges(model["merges"], specials if specials.keys() & model["vocab"].keys() else {}, path)
        model["vocab"] = {name(text): token_id for text, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[name(text), score] for text, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = name(model["unk_token"])
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    tokens = [
        {"id": token.id, "content": name(token.text), **{flag: getattr(token, flag) for flag in flags},
         "special": token.text in specials}
        for token in sorted(added, key=lambda token: token.id or 0)
    ]  # fmt: skip
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": raw.get("normalizer"),
        "pre_tokenizer": raw.get("pre_tokenizer"),
        "post_processor": None,
        "decoder": raw.get("decoder"),
        "model": model,
    }
    return json.dumps(definition, ensure_ascii=False, separators=(",", ":"))


def _merges(given: list[Any], without: Mapping[str, int], path: Path) -> list[Any]:
    """Merges in one spelling, ``a b`` where neither holds a space; without those that have or make special tokens."""
    merges: list[Any] = given
    if not all(isinstance(pair, str) for pair in given):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in given]
        if not all(isinstance(pair, list) and [*map(type, pair)] == [str, str] for pair in pairs):
            raise CheckpointError("malformed: its merges cannot be read", path, "fetch it again")
        joined = [" ".join(pair) for pair in pairs]
        merges = pairs if any(pair.count(" ") != 1 for pair in joined) else joined
    return [pair for pair in merges if not _touches(pair, without)] if without else merges


def _touches(pair: str | list[str], tokens: Mapping[str, int]) -> bool:
    left, right = pair.split(" ", 1) if isinstance(pair, str) and " " in pair else (pair[0], pair[-1])
    return left in tokens or right in tokens or left + right in tokens
