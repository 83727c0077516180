"""What a ``tokenizer.json`` may hold: the parts that are passed on to the ``tokenizers`` library, which trusts them.

A file is hostile until it is checked. Every part must be of a known kind, so that neither a pattern nor a replacement
can take time or memory without end, and a kind that is refused is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError

_KNOWN = {
    "normalizer": {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend", "Replace"},
    "pre_tokenizer": {"ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit"},
    "decoder": {"ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip"},
    "post_processor": {"ByteLevel", "TemplateProcessing"},
}
_MEMBERS = {
    "normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders",
    "post_processor": "processors",
}  # fmt: skip
_MODELS = {"BPE", "Unigram"}
_MOST_PARTS, _DEEPEST = 32, 4
_LONGEST_TEXT, _LONGEST_PATTERN = 64, 4000
_MOST_GROWTH = 64
_MOST_TOKENS, _LONGEST_TOKEN = 1 << 21, 4096
_OTHER_KIND = "this tokenizer is of no LLaMA model that is known here"


def check_definition(facts: dict[str, Any], path: Path) -> None:
    """Refuse a ``tokenizer.json`` of another kind than LLaMA and its relatives have, or one that is malformed.

    Raises:
        CheckpointError: with the name of the part and its kind.
    """
    for key in _KNOWN:
        growth = 1
        for kind, part in _parts(facts, key, path):
            _check_part(key, kind, part, path)
            if kind in ("Replace", "Prepend"):
                growth *= max(1, len(part.get("content", part.get("prepend", "")).encode()))
        if growth > _MOST_GROWTH:
            raise CheckpointError(f"its {key} makes a text {growth} times as long", path, _OTHER_KIND)
    if not next(_parts(facts, "decoder", path), None):
        raise CheckpointError("has no decoder, so ids cannot be turned into text", path, _OTHER_KIND)
    _check_model(facts.get("model"), path)


def parts_of(facts: dict[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """The parts of a checked definition with their kinds: of ``normalizer``, ``pre_tokenizer``, ``decoder``."""
    return list(_parts(facts, key, Path()))


def kinds_of(facts: dict[str, Any], key: str) -> list[str]:
    """The kinds of these parts."""
    return [kind for kind, _ in parts_of(facts, key)]


def templates_of(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The templates of a checked definition's post-processor: what is put around a text."""
    return [part for kind, part in _parts(facts, "post_processor", Path()) if kind == "TemplateProcessing"]


def _parts(facts: dict[str, Any], key: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each part and its kind, sequences taken apart."""
    waiting, seen = [(facts.get(key), 0)], 0
    while waiting:
        part, depth = waiting.pop(0)
        if part is None and depth == 0:
            return
        kind = part.get("type") if isinstance(part, dict) else None
        seen += 1
        if not isinstance(part, dict) or not isinstance(kind, str) or depth > _DEEPEST or seen > _MOST_PARTS:
            raise CheckpointError(f"malformed: its {key} cannot be read", path, "fetch it again")
        if kind == "Sequence":
            members = part.get(_MEMBERS[key])
            if not isinstance(members, list):
                raise CheckpointError(f"malformed: its {key} cannot be read", path, "fetch it again")
            waiting[:0] = [(member, depth + 1) for member in members]
        elif kind not in _KNOWN[key]:
            raise CheckpointError(f"its {key} is of kind {kind[:40]!r}, which is not supported", path, _OTHER_KIND)
        else:
            yield kind, part


def _check_part(key: str, kind: str, part: dict[str, Any], path: Path) -> None:
    for name, value in part.items():
        if isinstance(value, str) and len(value) > _LONGEST_TEXT:
            raise CheckpointError(f"its {key} {kind} has a {name[:40]!r} of {len(value)} characters", path, _OTHER_KIND)
        if type(value) is int and value > _LONGEST_TEXT:
            raise CheckpointError(f"its {key} {kind} has {name[:40]!r} {value}", path, _OTHER_KIND)
    if kind in ("Split", "Replace"):
        pattern = part.get("pattern")
        if not isinstance(pattern, dict) or len(pattern) != 1 or not isinstance(next(iter(pattern.values())), str):
            raise CheckpointError(f"malformed: a pattern of its {key} cannot be read", path, "fetch it again")
        text = next(iter(pattern.values()))
        if not text:
            raise CheckpointError(f"a pattern of its {key} is empty", path, _OTHER_KIND)
        if "Regex" in pattern and (why := pattern_fault(text)) is not None:
            raise CheckpointError(f"a pattern of its {key} {why}: {text[:60]!r}", path, _OTHER_KIND)
    unread = kind in ("Replace", "Prepend") and not isinstance(part.get("content", part.get("prepend")), str)
    if unread or (kind == "TemplateProcessing" and not _is_template(part.get("single"))):
        raise CheckpointError(f"malformed: its {key} cannot be read", path, "fetch it again")


def _is_template(parts: Any) -> bool:
    """A list of ``{"SpecialToken": {"id": ...}}`` and ``{"Sequence": {"id": ...}}``."""
    if not isinstance(parts, list) or not parts:
        return False
    holders = [next(iter(part.values())) for part in parts if isinstance(part, dict) and len(part) == 1]
    sound = all(isinstance(holder, dict) and isinstance(holder.get("id"), str) for holder in holders)
    return sound and len(holders) == len(parts)


def pattern_fault(pattern: str) -> str | None:
    """Why a regular expression could take exponential time, by its spelling; None: it cannot.

    That needs a repeat within a repeat, or a reference to what was matched. No tokenizer's pattern has them.
    """
    if len(pattern) > _LONGEST_PATTERN:
        return f"has {len(pattern)} characters"
    if re.search(r"\\[1-9gk]|\(\?[^:=!<imsx-]|\(\?<[^=!]", pattern):
        return "refers to its own groups"
    groups, in_class, last, position = [False], 0, False, 0  # whether a repeat is inside each open group
    while position < len(pattern):
        character, step = pattern[position], 1
        if character == "\\":
            named = re.compile(r"\\[pPx]\{[^{}]*\}").match(pattern, position)
            step = 2 if named is None else len(named[0])
        if character == "[":
            in_class, last = in_class + 1, False
        elif character == "]" and in_class:
            in_class -= 1
        elif in_class or character == "\\":
            last = False
        elif character == "(":
            groups.append(False)
        elif character == ")":
            last = groups.pop() if len(groups) > 1 else False
            groups[-1] |= last
        elif character in "*+{":
            if last:
                return "has a repeat within a repeat"
            groups[-1] = True
        elif character != "?":
            last = False
        position += step
    return None


def _check_model(model: Any, path: Path) -> None:
    kind = model.get("type") if isinstance(model, dict) else None
    if isinstance(model, dict) and kind is None and "merges" in model:
        kind = "BPE"  # files of 2020 and earlier leave it out
    if not isinstance(kind, str) or kind not in _MODELS:
        what = f"its model is of kind {str(kind)[:40]!r}, only {' and '.join(sorted(_MODELS))} are supported"
        raise CheckpointError(what, path, _OTHER_KIND)
    if model.get("dropout"):
        raise CheckpointError("its model has dropout, so a text would have other ids each time", path, _OTHER_KIND)
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise CheckpointError(f"its model has a {key}, which is not supported", path, _OTHER_KIND)
    vocabulary: Any = model.get("vocab")
    if not isinstance(vocabulary, dict if kind == "BPE" else list) or not 0 < len(vocabulary) <= _MOST_TOKENS:
        raise CheckpointError("malformed: its vocabulary cannot be read", path, "fetch it again")
    texts = set(vocabulary) if kind == "BPE" else {entry[0] for entry in vocabulary if _is_scored(entry)}
    longest = max(map(len, texts), default=0)
    sound = len(texts) == len(vocabulary) and 0 < longest <= _LONGEST_TOKEN
    if kind == "BPE":
        if not isinstance(model.get("merges"), list):
            raise CheckpointError("malformed: its merges cannot be read", path, "fetch it again")
        ids = list(model["vocab"].values())
        sound &= all(type(n) is int and 0 <= n < _MOST_TOKENS for n in ids) and len(set(ids)) == len(vocabulary)
    if not sound:
        what = "malformed: its vocabulary has a token or an id twice, or one that cannot be read"
        raise CheckpointError(what, path, "fetch it again")


def _is_scored(entry: Any) -> bool:
    """A token and a finite score, as a Unigram model lists them."""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
        return False
    return type(entry[1]) in (int, float) and abs(entry[1]) < 1e9 and math.isfinite(entry[1])
