"""What the files beside a vocabulary say of it: added tokens, BOS and EOS, and whether they are put around a text.

transformers reads these from ``tokenizer.json``, ``added_tokens.json``, ``tokenizer_config.json`` and
``special_tokens_map.json``, and the model's BOS and EOS from ``config.json`` and ``generation_config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.strict_json import read_json
from llamatune.tokenizers.tokenizer import JSON_FILE

ADDED, CONFIG, ROLES = "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"
MODEL_FILES = ("config.json", "generation_config.json")
LARGEST_JSON_BYTES = 64 << 20
"""The largest published ``tokenizer.json`` (a vocabulary of 262,144) has 33 MB."""

_ROLE_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LIST_KEYS = ("additional_special_tokens", "extra_special_tokens")
_MARKED = re.compile(r"<.*>|\[.*\]", re.DOTALL)
_LISTED = 5


@dataclass(frozen=True)
class AddedToken:
    """A token of one file. ``id`` None: the file does not say; ``special`` None likewise.

    ``lstrip`` and ``rstrip``: white space beside it is part of it; ``single_word``: only between other characters than
    letters, digits and _.
    """

    text: str
    id: int | None
    file: Path
    special: bool | None = None
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @property
    def is_special(self) -> bool:
        """As the file says, or else by its look: ``<|im_end|>`` and ``[SEP]`` are no words of a text."""
        return bool(_MARKED.fullmatch(self.text)) if self.special is None else self.special


class TokenizerFiles:
    """The JSON files of a tokenizer's directory; a missing one is empty. ``facts`` are files that were read already."""

    def __init__(
        self,
        directory: Path,
        names: Iterable[str] = (JSON_FILE, ADDED, CONFIG, ROLES),
        facts: Mapping[str, dict[str, Any]] | None = None,
    ) -> None:
        self.directory = directory
        self.facts = dict(facts or {})
        for name in names:
            file = directory / name
            self.facts[name] = read_json(file, max_bytes=LARGEST_JSON_BYTES) if file.exists() else {}

    @cached_property
    def tokens(self) -> list[AddedToken]:
        """Every added or named token of every file, in the files' order.

        Raises:
            CheckpointError: a file whose tokens cannot be read.
        """
        found = []
        for name, facts in self.facts.items():
            file = self.directory / name
            try:
                found += [token for token in _tokens(file, facts) if _is_sound(token)]
            except (AttributeError, LookupError, TypeError, ValueError):
                raise CheckpointError("malformed: its tokens cannot be read", file, "fetch it again") from None
        return found

    def role(self, role: str) -> tuple[str, Path] | None:
        """The text of ``bos_token`` or ``eos_token``, and the file that gives it.

        Raises:
            CheckpointError: two files give two.
        """
        given = {name: _content(self.facts[name].get(role)) for name in (CONFIG, ROLES) if name in self.facts}
        given = {name: text for name, text in given.items() if text is not None}
        if len(set(given.values())) > 1:
            what = f"{role} is {given[CONFIG]!r}, but {given[ROLES]!r} in {ROLES}"
            raise CheckpointError(what, self.directory / CONFIG, "make the two files agree")
        return next(((text or "", self.directory / name) for name, text in given.items()), None)

    def puts(self, flag: str) -> bool | None:
        """``add_bos_token`` or ``add_eos_token``; None: not said."""
        value = self.facts.get(CONFIG, {}).get(flag)
        if type(value) not in (bool, type(None)):
            what = f"{flag} is {str(value)[:40]!r}"
            raise CheckpointError(what, self.directory / CONFIG, "true or false is expected")
        return value


def model_ids(directory: Path, key: str) -> dict[Path, list[int]]:
    """``bos_token_id`` or ``eos_token_id`` of the model's files; a malformed file is left to the model's reader."""
    found = {}
    for name in MODEL_FILES:
        file = directory / name
        try:
            stated = read_json(file).get(key) if file.exists() else None
        except CheckpointError:
            continue
        ids = [n for n in (stated if isinstance(stated, list) else [stated]) if type(n) is int and n >= 0]
        if ids:
            found[file] = ids
    return found


def vocabulary_of(facts: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Tokens and ids of ``tokenizer.json``'s model: an object of ids, or a list in the ids' order."""
    vocabulary = (facts.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):
        return [(entry[0], number) for number, entry in enumerate(vocabulary)]
    return list(vocabulary.items())


def listed(tokens: Iterable[tuple[str, int | None]]) -> str:
    """Tokens and ids for an error message, the first few of them."""
    shown = [f"{token[:40]!r} ({'no id' if token_id is None else token_id})" for token, token_id in tokens]
    return ", ".join(shown[:_LISTED]) + (f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else "")


def _tokens(file: Path, facts: dict[str, Any]) -> Iterator[AddedToken]:
    if file.name == JSON_FILE:
        for token in facts.get("added_tokens") or []:
            yield _token(token, token["id"], file)
    elif file.name == ADDED:
        yield from (AddedToken(text, token_id, file) for text, token_id in facts.items())
    else:
        for token_id, token in (facts.get("added_tokens_decoder") or {}).items():
            yield _token(token, int(token_id), file)
        more: list[Any] = [facts.get(key) for key in _ROLE_KEYS]
        for key in _LIST_KEYS:
            named = facts.get(key) or []
            more += named.values() if isinstance(named, dict) else named
        yield from (AddedToken(text, None, file, special=True) for text in map(_content, more) if text is not None)


def _token(facts: dict[str, Any], token_id: int, file: Path) -> AddedToken:
    flags = {key: facts.get(key, False) for key in ("special", "lstrip", "rstrip", "single_word", "normalized")}
    if not all(type(flag) is bool for flag in flags.values()):
        raise TypeError
    return AddedToken(facts["content"], token_id, file, **flags)


def _is_sound(token: AddedToken) -> bool:
    if not isinstance(token.text, str) or type(token.id) not in (int, type(None)) or (token.id or 0) < 0:
        raise TypeError
    return token.text != ""


def _content(token: Any) -> str | None:
    """The text of a token, given as a string or as an object with ``content``; None if it is empty."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str | None):
        raise TypeError
    return text or None
