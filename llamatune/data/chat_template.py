"""Chat templates: the Jinja source that writes a conversation as one text, with what it may name; built-in ones."""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llamatune.data.templates import BOUNDARY
from llamatune.errors import CheckpointError, LlamatuneError, SpecError
from llamatune.required_versions import require_version

if TYPE_CHECKING:
    from llamatune.data.jinja_engine import Engine
    from llamatune.data.jinja_process import JinjaProcess
    from llamatune.tokenizers.tokenizer import Tokenizer

LARGEST_SOURCE = 256 << 10
_LARGEST_NAME, _MOST_VARIABLES = 1000, 100
_VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")

_LLAMA_2 = """\
{%- set opening = namespace(text='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set opening.text = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- bos_token + '[INST] ' + (opening.text + message['content']) | trim + ' [/INST]' -}}
{%- set opening.text = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] | trim + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
_LLAMA_3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
_BOS = "{{- bos_token -}}\n"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template.

    Args:
        name: a built-in name, a file's name without its suffix, or ``model``: the model's own.
        source: the template's text.
        variables: texts that it may name, such as ``bos_token``.
        now: what ``strftime_now`` takes for the present, where it is named; so a prompt stays what was trained.
        where: the file it was read from, for errors, of which ``error`` is the kind.
        boundary: ``templates.BOUNDARY``, or None for the older rule.
    """

    name: str
    source: str
    variables: Mapping[str, str]
    now: str | None = None
    where: object = field(default=None, compare=False)
    error: type[LlamatuneError] = field(default=CheckpointError, compare=False)
    boundary: str | None = BOUNDARY

    def __post_init__(self) -> None:
        """Check the sizes; the source itself is checked by whoever renders it."""
        if len(self.source) > LARGEST_SOURCE:
            what = f"the chat template has {len(self.source):,} characters, more than {LARGEST_SOURCE:,}"
            raise self.error(what, self.where)

    def __reduce__(self) -> tuple[type[ChatTemplate], tuple[Any, ...]]:
        return ChatTemplate, (
            self.name, self.source, self.variables, self.now, self.where, self.error, self.boundary,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The template as JSON values; ``from_dict`` reads them back."""
        made = {"name": self.name, "chat_template": self.source, "variables": dict(self.variables)}
        others = {"now": self.now, "boundary": self.boundary}
        return made | {name: value for name, value in others.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: object = None) -> ChatTemplate:
        """The template of values that ``to_dict`` returned; anything else raises ``CheckpointError``."""
        name, source, variables = (data.get(key) for key in ("name", "chat_template", "variables"))
        now, boundary = data.get("now"), data.get("boundary")
        unknown = data.keys() - {"name", "chat_template", "variables", "now", "boundary"}
        texts = isinstance(name, str) and len(name) <= _LARGEST_NAME and isinstance(source, str)
        if not texts or not _are_variables(variables) or unknown:
            what = "a stored chat template is its name, its chat_template and its variables, each a text"
            raise CheckpointError(what, where, "fetch or make it again")
        if now is not None and not (isinstance(now, str) and _MOMENT.fullmatch(now)):
            raise CheckpointError("'now' of a stored chat template is no time", where, "fetch or make it again")
        if boundary not in (None, BOUNDARY):
            what = f"'boundary' of a stored chat template is {boundary!r}"
            raise CheckpointError(what, where, f"known: {BOUNDARY}")
        return cls(str(name), str(source), dict(variables or {}), now, where, boundary=boundary)

    @property
    def is_built_in(self) -> bool:
        return self.source in _OURS

    @functools.cached_property
    def engine(self) -> Engine | JinjaProcess:
        """What renders it: a template of our own here, any other in a process with limits.

        ``error`` if it cannot be compiled.
        """
        from llamatune.data.jinja_engine import Broken, Engine
        from llamatune.data.jinja_process import JinjaProcess, Stuck

        require_version("jinja2", importlib.metadata.version("jinja2"))
        try:
            return (Engine if self.is_built_in else JinjaProcess)(self.source, self.variables, self.now)
        except (Broken, Stuck) as fault:
            raise self.unusable(fault) from None

    def unusable(self, fault: object) -> LlamatuneError:
        return self.error(f"the chat template cannot be used: {fault}", self.where, "use another --template")


def _are_variables(variables: object) -> bool:
    return (
        isinstance(variables, dict)
        and len(variables) <= _MOST_VARIABLES
        and all(isinstance(name, str) and _VARIABLE.fullmatch(name) for name in variables)
        and all(isinstance(text, str) and len(text) <= _LARGEST_NAME for text in variables.values())
    )


_OURS = {_LLAMA_2, _LLAMA_3, _CHATML, _BOS + _CHATML}
_BUILT_IN = {
    "llama3-chat": (_LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "chatml": (_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama2-chat": (_LLAMA_2, ()),
}
CHAT_TEMPLATES = tuple(_BUILT_IN)
"""Names of the built-in chat templates; the first whose special tokens a tokenizer has is its default."""


def built_in_chat_template(name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """A built-in template for a tokenizer. ``SpecError`` if that lacks a special token of it.

    ``chatml`` begins with the BOS where the tokenizer puts one before a text.
    """
    source, needed = _BUILT_IN[name]
    lacking = [text for text in needed if text not in tokenizer.special_ids]
    if lacking:
        shown = ", ".join(map(repr, lacking))
        known = [other for other in CHAT_TEMPLATES if fits(other, tokenizer)]
        todo = f"give one that fits: --template {' or '.join(known)}"
        raise SpecError(f"template {name!r} needs the special tokens {shown}", tokenizer.path, todo)
    if name == "chatml" and tokenizer.bos_id is not None:
        source = _BOS + source
    return ChatTemplate(name, source, variables_of(tokenizer))


def fits(name: str, tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has the special tokens of a built-in template."""
    return all(text in tokenizer.special_ids for text in _BUILT_IN[name][1])


def variables_of(tokenizer: Tokenizer) -> dict[str, str]:
    """The variables of a template that are known from the tokenizer alone: BOS and EOS."""
    bos = "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id)
    return {"bos_token": bos, "eos_token": tokenizer.piece(tokenizer.eos_id)}
