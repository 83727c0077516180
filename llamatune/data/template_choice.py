"""The choice of a template: by name, of a file, of a model directory, of a manifest, or the default of a row format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamatune.data.chat_template import CHAT_TEMPLATES, ChatTemplate, built_in_chat_template, fits, variables_of
from llamatune.data.chat_template_files import OWN, made_chat_template, own_chat_template
from llamatune.data.templates import TEMPLATES, Template, read_template
from llamatune.errors import SpecError
from llamatune.events import OnEvent, ignore_event
from llamatune.path_expansion import expand_path
from llamatune.tokenizers.chat_templates import read_template_source
from llamatune.tokenizers.tokenizer import Tokenizer

TEMPLATE_NAMES = (*TEMPLATES, *CHAT_TEMPLATES, OWN)


def load_template(name_or_file: str, tokenizer: Tokenizer, on_event: OnEvent = ignore_event) -> Template | ChatTemplate:
    """A built-in template, ``model`` or ``model:NAME`` for one beside the tokenizer, or that of a file.

    A ``.jinja`` file holds a chat template, another one YAML.

    Raises:
        SpecError: there is no such name or file, or the file is no template, or the tokenizer lacks its tokens.
        CheckpointError: the model's own template cannot be read.
    """
    if name_or_file in TEMPLATES:
        return TEMPLATES[name_or_file]
    if name_or_file in CHAT_TEMPLATES:
        return built_in_chat_template(name_or_file, tokenizer)
    if name_or_file == OWN or name_or_file.startswith(f"{OWN}:"):
        own = own_chat_template(tokenizer, name_or_file.removeprefix(OWN).removeprefix(":"), on_event)
        if own is None:
            todo = f"give one of: {', '.join(CHAT_TEMPLATES)}"
            raise SpecError("there is no chat template beside the tokenizer", tokenizer.path, todo)
        return own
    path = Path(expand_path(name_or_file))
    if not path.exists():
        todo = f"give a YAML file, a .jinja file or one of: {', '.join(TEMPLATE_NAMES)}"
        raise SpecError(f"no template {name_or_file!r}", None, todo)
    if path.suffix == ".jinja":
        source = read_template_source(path, SpecError)
        return made_chat_template(path.stem, source, variables_of(tokenizer), path, SpecError)
    return read_template(path)


def stored_template(data: Mapping[str, Any], where: object = None) -> Template | ChatTemplate:
    """The template of values that ``to_dict`` returned; anything else raises ``CheckpointError``."""
    return ChatTemplate.from_dict(data, where) if "chat_template" in data else Template.from_dict(data, where)


def default_template(row_format: str, tokenizer: Tokenizer, on_event: OnEvent) -> Template | ChatTemplate:
    """Of a chat the model's own, or the first built-in one that fits; else the one of the format's name."""
    if row_format != "chat":
        return TEMPLATES[row_format]
    own = own_chat_template(tokenizer, on_event=on_event)
    return own or built_in_chat_template(next(name for name in CHAT_TEMPLATES if fits(name, tokenizer)), tokenizer)
