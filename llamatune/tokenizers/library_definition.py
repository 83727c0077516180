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
from llamatune.tokenizers.json_definition import parts_of

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


def prefixes(raw: dict[str, Any]) -> bool:
    """Whether a checked definition puts a space before a text."""
    kinds = [*parts_of(raw, "normalizer"), *parts_of(raw, "pre_tokenizer")]
    return any(kind == "Prepend" or _adds_space(part) for kind, part in kinds)


def without_prefix(definition: str) -> str:
    """A definition for the library, changed so that it puts no space before a text."""
    facts = json.loads(definition)
    for key in ("normalizer", "pre_tokenizer"):
        facts[key] = _without_prefix(facts[key])
    return json.dumps(facts, ensure_ascii=False, separators=(",", ":"))


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    if part is None or part["type"] == "Prepend":
        return None
    for members in ("normalizers", "pretokenizers"):
        if members in part:
            kept = [changed for member in part[members] if (changed := _without_prefix(member)) is not None]
            return {**part, members: kept}
    if not _adds_space(part):
        return part
    never = {"prepend_scheme": "never"} if part["type"] == "Metaspace" else {}
    return {**part, "add_prefix_space": False, **never}


def _adds_space(part: dict[str, Any]) -> bool:
    """Of a pre-tokenizer; what is not said is ``true`` or ``always`` to the library."""
    if part["type"] == "Metaspace":
        return part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True) is not False
    return part["type"] == "ByteLevel" and part.get("add_prefix_space", True) is not False


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
