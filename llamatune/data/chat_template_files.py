"""The chat templates in the files of a model directory, and the texts that they may name."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

from llamatune.data.chat_template import LARGEST_SOURCE, ChatTemplate, variables_of
from llamatune.errors import CheckpointError, LlamatuneError, SpecError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.safe_reading import read_bytes
from llamatune.tokenizers.added_tokens import CONFIG, ROLES, TokenizerFiles
from llamatune.tokenizers.tokenizer import JSON_FILE, SENTENCEPIECE_FILE, Tokenizer

OWN = "model"
"""The name of the template that a model directory brings; ``model:NAME`` is another one of it."""

_FILE, _MORE = "chat_template.jinja", "additional_chat_templates"
_DEFAULT = "default"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def own_chat_template(tokenizer: Tokenizer, name: str = "", on_event: OnEvent = ignore_event) -> ChatTemplate | None:
    """The chat template beside a tokenizer, by default the one called ``default``; None: there is none.

    A file of its own replaces what ``tokenizer_config.json`` says, as in transformers.

    Raises:
        CheckpointError: a malformed file.
        SpecError: there are templates, but none of this name.
    """
    directory = tokenizer.path.parent
    if tokenizer.path.name not in (JSON_FILE, SENTENCEPIECE_FILE):
        return None  # a file of another name stands alone
    files = TokenizerFiles(directory, (CONFIG, ROLES))
    sources = {found: (text, directory / CONFIG) for found, text in _configured(files).items()}
    for path in [directory / _FILE, *sorted((directory / _MORE).glob("*.jinja"))]:
        if not path.exists():
            continue
        found, text = _DEFAULT if path.name == _FILE else path.stem, read_source(path)
        if sources.get(found, (text,))[0] != text:
            on_event(Notice(f"{path}: differs from the chat_template in {CONFIG}; this file is used", "warning"))
        sources[found] = text, path
    if not sources:
        return None
    name = name or _DEFAULT
    if name not in sources:
        known = ", ".join(f"--template {OWN}:{other}" for other in sorted(sources))
        raise SpecError(f"no chat template {name!r} in the model's directory", directory, f"it has {known}")
    source, path = sources[name]
    shown = OWN if name == _DEFAULT else f"{OWN}:{name}"
    return made_chat_template(shown, source, _variables(files, tokenizer), path)


def made_chat_template(
    name: str, source: str, variables: dict[str, str], where: object, error: type[LlamatuneError] = CheckpointError
) -> ChatTemplate:
    """A template as it is read for the first time: what it takes for the present is fixed now."""
    now = datetime.datetime.now().isoformat(timespec="seconds") if "strftime_now" in source else None
    return ChatTemplate(name, source, variables, now, where, error)


def read_source(path: Path, error: type[LlamatuneError] = CheckpointError) -> str:
    """The text of a ``.jinja`` file."""
    try:
        return read_bytes(path, error, 4 * LARGEST_SOURCE).decode()
    except UnicodeDecodeError as fault:
        raise error(f"not UTF-8 at byte {fault.start}", path) from None


def _variables(files: TokenizerFiles, tokenizer: Tokenizer) -> dict[str, str]:
    """As transformers gives them: those that the files name. BOS and EOS otherwise as the tokenizer has them."""
    named = dict[str, str]()
    for role in _ROLES:
        for facts in files.facts.values():
            token = facts.get(role)
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str) and text:
                named.setdefault(role, text)
    silent = not any("bos_token" in facts for facts in files.facts.values())
    known = variables_of(tokenizer)
    if not silent:  # null: the model has none
        known.pop("bos_token")
    return {**known, **named}


def _configured(files: TokenizerFiles) -> dict[str, str]:
    """The templates in ``tokenizer_config.json``, by name: one text, or a list of named ones."""
    stated: Any = files.facts[CONFIG].get("chat_template")
    if stated is None:
        return {}
    if isinstance(stated, str):
        return {_DEFAULT: stated}
    found = {}
    for entry in stated if isinstance(stated, list) else [None]:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str) or not re.fullmatch(r"[\w.-]{1,100}", name):
            what = "chat_template is neither a text nor a list of names and templates"
            raise CheckpointError(what, files.directory / CONFIG, "fetch it again")
        found[name] = text
    return found
