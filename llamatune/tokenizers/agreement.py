"""Agreement check of a ``tokenizer.model`` with the other tokenizer files of its directory.

transformers reads tokens from four more files, and the model's BOS and EOS from two. SentencePiece encodes with
``tokenizer.model`` alone. If they differ, rows would have other ids than those that the model was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent
from llamatune.strict_json import read_json
from llamatune.tokenizers.tokenizer import SENTENCEPIECE_FILE

_WHOLE, _ADDED = "tokenizer.json", "added_tokens.json"
_CONFIG, _ROLES = "tokenizer_config.json", "special_tokens_map.json"
_MODEL_FILES = ("config.json", "generation_config.json")
_ROLE_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LIST_KEYS = ("additional_special_tokens", "extra_special_tokens")
_PADDING = re.compile(r"\W*pad(_token)?\W*", re.IGNORECASE)
_LARGEST = 64 << 20
_LISTED = 5
_REMEDY = "text is encoded with tokenizer.model alone: use a model whose files agree with it"


def check_agreement(path: Path, pieces: Sequence[str], bos_id: int, eos_id: int, on_event: OnEvent) -> None:
    """Compare a ``tokenizer.model`` with the other files of its directory; a file of another name is not checked.

    A padding token that only they have, such as ``<pad>``, is accepted with a notice: no row contains it, since batches
    have no padding.

    Raises:
        CheckpointError: tokens that it lacks or has under other ids; another BOS or EOS, be it the tokenizer's or the
            model's; ``add_bos_token`` false or ``add_eos_token`` true; a malformed tokenizer file.
    """
    if path.name != SENTENCEPIECE_FILE:
        return
    directory = path.parent
    files = {name: _read(directory / name) for name in (_WHOLE, _ADDED, _CONFIG, _ROLES)}
    _check_tokens(directory, files, pieces, on_event)
    for name in (_CONFIG, _ROLES):
        for role, token_id in (("bos_token", bos_id), ("eos_token", eos_id)):
            token = _content(files[name].get(role))
            if token not in (None, pieces[token_id]):
                what = f"{role} is {token!r}, but that of tokenizer.model is {pieces[token_id]!r}"
                raise CheckpointError(what, directory / name, _REMEDY)
    for flag, needed in (("add_bos_token", True), ("add_eos_token", False)):
        value = files[_CONFIG].get(flag)
        if value is not None and value is not needed:
            what = f"{flag} is {str(value)[:40]!r}, but BOS is always put before a text, and EOS never after a prompt"
            raise CheckpointError(what, directory / _CONFIG, f"use a model with {flag} {str(needed).lower()}")
    if _added_around(files[_WHOLE]) not in (None, [pieces[bos_id]]):
        what = f"{directory / _WHOLE}: its post_processor adds other tokens to a text than the BOS that is added here"
        on_event(Notice(what, "warning"))
    for name in _MODEL_FILES:
        _check_model(directory / name, {"bos_token_id": bos_id, "eos_token_id": eos_id}, pieces)


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, max_bytes=_LARGEST) if file.exists() else {}


def _check_tokens(directory: Path, files: dict[str, dict[str, Any]], pieces: Sequence[str], on_event: OnEvent) -> None:
    ids = {piece: number for number, piece in enumerate(pieces)}
    unknown: dict[str, tuple[int | None, Path]] = {}
    for name, facts in files.items():
        try:
            tokens = list(_tokens(name, facts))
            if not all(isinstance(token, str) and type(token_id) in (int, type(None)) for token, token_id in tokens):
                raise TypeError
            lost = ids.keys() - dict(tokens).keys() if name == _WHOLE and _vocabulary(facts) else ()
        except (AttributeError, LookupError, TypeError, ValueError):
            raise CheckpointError("malformed: its tokens cannot be read", directory / name, "fetch it again") from None
        for token, token_id in tokens:
            if token not in ids or token_id not in (None, ids[token]):
                unknown.setdefault(token, (token_id, directory / name))
        if lost:
            shown = _listed((token, ids[token]) for token in pieces if token in lost)
            raise CheckpointError(f"lacks tokens of tokenizer.model: {shown}", directory / name, _REMEDY)
    padding = {token: unknown.pop(token) for token in list(unknown) if _PADDING.fullmatch(token)}
    if unknown:
        file = next(iter(unknown.values()))[1]
        shown = _listed((token, token_id) for token, (token_id, _) in unknown.items())
        raise CheckpointError(f"tokens that tokenizer.model does not have: {shown}", file, _REMEDY)
    for token, (token_id, file) in padding.items():
        on_event(Notice(f"{file}: {_listed([(token, token_id)])} is not in tokenizer.model; no row will contain it"))


def _tokens(name: str, facts: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Every token of a file, with its id if the file gives one."""
    if name == _WHOLE:
        yield from _vocabulary(facts)
        for token in facts.get("added_tokens") or []:
            yield token["content"], token["id"]
    elif name == _ADDED:
        yield from facts.items()
    else:
        for token_id, token in (facts.get("added_tokens_decoder") or {}).items():
            yield token["content"], int(token_id)
        more: list[Any] = [facts.get(key) for key in _ROLE_KEYS]
        for key in _LIST_KEYS:
            listed = facts.get(key) or []
            more += listed.values() if isinstance(listed, dict) else listed
        yield from ((token, None) for token in map(_content, more) if token is not None)


def _vocabulary(facts: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Tokens and ids of ``tokenizer.json``'s model: an object of ids, or a list in the ids' order."""
    vocabulary = (facts.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):
        return [(entry[0], number) for number, entry in enumerate(vocabulary)]
    return list(vocabulary.items())


def _content(token: Any) -> str | None:
    """The text of a token, given as a string or as an object with ``content``; None if it is empty."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise TypeError
    return text or None


def _added_around(facts: dict[str, Any]) -> list[str] | None:
    """The special tokens that ``tokenizer.json`` puts around one text; None: it does not say."""
    processor = facts.get("post_processor")
    if not isinstance(processor, dict) or processor.get("type") != "TemplateProcessing":
        return None
    try:
        return [part["SpecialToken"]["id"] for part in processor["single"] if "SpecialToken" in part]
    except (LookupError, TypeError):
        return []


def _check_model(file: Path, needed: dict[str, int], pieces: Sequence[str]) -> None:
    """Compare BOS and EOS of a model's configuration; a malformed one is left to the model's reader."""
    try:
        facts = _read(file)
    except CheckpointError:
        return
    for key, token_id in needed.items():
        stated = facts.get(key)
        ids = [n for n in (stated if isinstance(stated, list) else [stated]) if type(n) is int and n >= 0]
        if ids and token_id not in ids:
            shown = ", ".join(map(str, ids[:_LISTED]))
            what = f"{key} is {shown}, but that of tokenizer.model is {token_id} ({pieces[token_id]!r})"
            raise CheckpointError(what, file, "use the model's own tokenizer, or correct the id")


def _listed(tokens: Iterable[tuple[str, int | None]]) -> str:
    shown = [f"{token[:40]!r} ({'no id' if token_id is None else token_id})" for token, token_id in tokens]
    return ", ".join(shown[:_LISTED]) + (f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else "")
