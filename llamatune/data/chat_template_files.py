"""The chat templates in the files of a model directory, and the texts that they may name."""

from __future__ import annotations

import datetime

from llamatune.data.chat_template import ChatTemplate, variables_of
from llamatune.errors import CheckpointError, LlamatuneError, SpecError
from llamatune.events import OnEvent, ignore_event
from llamatune.tokenizers.added_tokens import CONFIG, ROLES, TokenizerFiles
from llamatune.tokenizers.chat_templates import DEFAULT, read_chat_templates
from llamatune.tokenizers.tokenizer import JSON_FILE, SENTENCEPIECE_FILE, Tokenizer

OWN = "model"
"""The name of the template that a model directory brings; ``model:NAME`` is another one of it."""

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def own_chat_template(tokenizer: Tokenizer, name: str = "", on_event: OnEvent = ignore_event) -> ChatTemplate | None:
    """The chat template beside a tokenizer, by default the one called ``default``; None: there is none.

    Raises:
        CheckpointError: a malformed file.
        SpecError: there are templates, but none of this name.
    """
    directory = tokenizer.path.parent
    if tokenizer.path.name not in (JSON_FILE, SENTENCEPIECE_FILE):
        return None  # a file of another name stands alone
    stored = read_chat_templates(directory, on_event)
    if not stored:
        return None
    name = name or DEFAULT
    if name not in stored:
        known = ", ".join(f"--template {OWN}:{other}" for other in sorted(stored))
        raise SpecError(f"no chat template {name!r} in the model's directory", directory, f"it has {known}")
    source, path = stored[name]
    variables = _variables(TokenizerFiles(directory, (CONFIG, ROLES)), tokenizer)
    return made_chat_template(OWN if name == DEFAULT else f"{OWN}:{name}", source, variables, path)


def made_chat_template(
    name: str, source: str, variables: dict[str, str], where: object, error: type[LlamatuneError] = CheckpointError
) -> ChatTemplate:
    """A template as it is read for the first time: what it takes for the present is fixed now."""
    now = datetime.datetime.now().isoformat(timespec="seconds") if "strftime_now" in source else None
    return ChatTemplate(name, source, variables, now, where, error)


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
