"""A prompt template as the Jinja chat template that tokenizers of transformers carry: from messages, the same text.

Of the text that the template makes of marked messages, each mark becomes an expression and the rest a literal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from llamatune.data.templates import Template
from llamatune.errors import SpecError

_USER, _SYSTEM, _ANSWER, _LAST = "\ue000", "\ue001", "\ue002", "\ue003"
_MARKS = {_USER: "user", _SYSTEM: "system", _ANSWER: "message['content']"}
_ESCAPES = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


def source_of(stored: Mapping[str, Any], puts_bos: Callable[[], bool]) -> str | None:
    """The chat template of a template as manifests store it; None as of ``as_jinja``.

    ``CheckpointError`` for what is none.
    """
    stated = stored.get("chat_template")
    return stated if isinstance(stated, str) else as_jinja(Template.from_dict(dict(stored)), puts_bos())


def as_jinja(template: Template, puts_bos: bool) -> str | None:
    """The chat template; None: prompts of this template are not made of messages, or hold the marks themselves.

    A conversation is an optional system message, then user and assistant in turn; anything else raises an exception in
    it. White space at the end of the template's prompt is the answer's, as in rows. Unlike rows, whose BOS and EOS are
    put in by their ids, it holds them: ``puts_bos`` says whether the tokenizer puts a BOS.
    """
    texts = (template.prompt, template.prompt_without_input, template.system, template.turn, template.before_completion)
    try:
        prompt = template.instruction_prompt(_USER)
    except SpecError:
        return None
    if prompt == _USER or any(mark in (text or "") for text in texts for mark in (*_MARKS, _LAST)):
        return None
    prompt, moved = template.split_prompt(prompt)
    turn = _turn(template, {}) if template.turn is not None else None
    if template.system is not None:
        begun = template.prompt_of({"user": _USER, "system": _SYSTEM}).removesuffix(moved)
        begun_turn = None if turn is None else _turn(template, {"system": _SYSTEM})
        prompt_text, turn_text = _either(begun, prompt), None if turn is None else _either(begun_turn or "", turn)
        refuse_system = ""
    else:
        prompt_text, turn_text = _expression(prompt), None if turn is None else _expression(turn)
        refuse_system = _refusal("system", "this template has no place for a system message")
    content = "message['content']|trim" if template.strip else "message['content']"
    answer = f"{_quoted(moved + template.before_completion)} ~ ({content}) ~ eos_token"
    later = (
        _refusal("not loop.last", "this template has no place for earlier messages")
        if turn_text is None
        else "{%- if not loop.last -%}{{- "
        + turn_text.replace("message['content']", f"({content})")
        + " -}}{%- endif -%}"
    )
    return (
        ("{{- bos_token -}}" if puts_bos else "")
        + "{%- set begin = 1 if messages[0]['role'] == 'system' else 0 -%}"
        + "{%- set system = messages[0]['content']" + ("|trim" if template.strip else "") + " if begin else '' -%}"
        + refuse_system
        + "{%- set state = namespace(user='') -%}"
        + "{%- for message in messages[begin:] -%}"
        + _refusal(
            "message['role'] != ('assistant' if loop.index0 % 2 else 'user')", "user and assistant must take turns"
        )
        + "{%- set user = state.user -%}{%- set first = system and loop.index0 < 2 -%}"
        + "{%- if loop.index0 % 2 == 0 -%}{%- set state.user = " + content + " -%}{%- set user = state.user -%}"
        + "{%- if loop.last -%}{{- " + prompt_text + " -}}{%- endif -%}"
        + "{%- else -%}" + later
        + "{%- if loop.last -%}{{- " + prompt_text + " -}}{{- " + answer + " -}}{%- endif -%}"
        + "{%- endif -%}{%- endfor -%}"
    )  # fmt: skip


def _turn(template: Template, fields: dict[str, str]) -> str:
    """The text of an earlier turn, in marks."""
    after = template.prompt_of({"user": _LAST})
    return template.prompt_of({"user": _LAST, **fields}, ((_USER, _ANSWER),)).removesuffix(after)


def _either(begun: str, plain: str) -> str:
    return f"(({_expression(begun)}) if first else ({_expression(plain)}))"


def _expression(text: str) -> str:
    """A Jinja expression of a text with marks."""
    parts = [part for part in re.split(f"([{''.join(_MARKS)}])", text) if part]
    return " ~ ".join(_MARKS.get(part) or _quoted(part) for part in parts) or "''"


def _quoted(text: str) -> str:
    return f"'{text.translate(_ESCAPES)}'"


def _refusal(condition: str, why: str) -> str:
    return "{%- if " + condition + " -%}{{- raise_exception(" + _quoted(why) + ") -}}{%- endif -%}"
