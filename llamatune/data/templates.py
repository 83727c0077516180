"""Prompt templates: built-in and custom ones, checked, and filled with the fields of a row; chats have their own.

A template is fixed text with ``{field}`` placeholders; ``{{`` and ``}}`` are literal braces. Nothing else has a
meaning (no attributes, no format specs, no code), because templates are also read from downloaded adapters. The
text of a field is inserted as it is: braces in it are not placeholders.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from llamatune.data.row_json import Row
from llamatune.errors import CheckpointError, DataError, LlamatuneError, SpecError
from llamatune.strict_yaml import read_yaml

_LARGEST_TEXT = 100_000
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")
_PROMPT_FIELDS = ("instruction", "question", "user", "prompt")
BOUNDARY = "prompt"
"""The rule by which prompts and answers are encoded: apart from each other, so that a row begins with its prompt's ids.

Directories and adapters without a rule are older: there the whole was encoded, and so was a prompt with all its spaces.
"""
NOT_IN_FILES = ("name", "strip", "boundary")
"""What a stored template has and a template file has not."""
_MOVED = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\r\n")
"""White space that a tokenizer joins to the word behind it; line breaks stay with the text before them."""


@dataclass(frozen=True)
class Template:
    """The texts of a prompt template.

    Args:
        name: a built-in name, or the file name without its suffix.
        prompt: the text of a prompt; the completion follows it directly.
        prompt_without_input: replaces ``prompt`` where the field ``input`` is empty.
        system: joins a chat's system message and first user message (``{system}``, ``{user}``).
        turn: an earlier turn of a chat (``{user}``, ``{assistant}``); turns precede the prompt, oldest first.
        before_completion: text between prompt and completion, trained as part of the completion.
        strip: white space at both ends of a chat's messages is removed.
        boundary: ``BOUNDARY``, or None for the older rule.
    """

    name: str
    prompt: str
    prompt_without_input: str | None = None
    system: str | None = None
    turn: str | None = None
    before_completion: str = ""
    strip: bool = False
    boundary: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The template as JSON values, without unset ones; ``from_dict`` reads them back."""
        return {name: value for name, value in vars(self).items() if value or name in ("name", "prompt")}

    @classmethod
    def from_dict(cls, data: object, where: object = None, error: type[LlamatuneError] = CheckpointError) -> Template:
        """The template of values that ``to_dict`` returned; anything else raises ``error``."""
        if not isinstance(data, dict):
            raise error("a template is a map of names to texts (prompt: ...)", where)
        known = {f.name for f in fields(cls)}
        for name, value in data.items():
            if name not in known:
                raise error(f"a template has no {name!r}", where, f"known: {', '.join(sorted(known))}")
            expected, shown = (bool, "true or false") if name == "strip" else (str, "a text")
            if type(value) is not expected and not (value is None and name not in ("name", "prompt", "strip")):
                raise error(f"{name!r} of a template must be {shown}", where)
            if name == "boundary" and value not in (None, BOUNDARY):
                raise error(f"'boundary' of a template is {value!r}", where, f"known: {BOUNDARY}")
            if isinstance(value, str):
                _check_text(name, value, where, error)
        for name in ("name", "prompt"):
            if name not in data:
                raise error(f"the template has no {name!r}", where)
        return cls(**{name: value for name, value in data.items() if value is not None})

    @property
    def placeholders(self) -> frozenset[str]:
        """The fields of a row that the template uses."""
        return _names_in(self.prompt, self.prompt_without_input, self.system)

    def prompt_of(self, fields: Mapping[str, str], turns: tuple[tuple[str, str], ...] = ()) -> str:
        """The prompt of one row. ``fields`` fill the placeholders, ``turns`` are a chat's earlier turns.

        ``DataError`` for a placeholder without a field.
        """
        filled = {"system": "", **fields}
        if self.strip:
            filled = {name: text.strip() for name, text in filled.items()}
            turns = tuple((user.strip(), answer.strip()) for user, answer in turns)
        if filled["system"] and self.system is not None:
            if turns:
                (user, answer), *later = turns
                turns = ((_fill(self.system, {**filled, "user": user}), answer), *later)
            else:
                filled["user"] = _fill(self.system, filled)
        context = "".join(_fill(self.turn or "", {"user": user, "assistant": answer}) for user, answer in turns)
        return context + _fill(self._prompt_for(filled), filled)

    def _prompt_for(self, fields: Mapping[str, str]) -> str:
        return self.prompt if self.prompt_without_input is None or fields.get("input") else self.prompt_without_input

    def completion_of(self, completion: str) -> str:
        return self.before_completion + (completion.strip() if self.strip else completion)

    def split_prompt(self, prompt: str) -> tuple[str, str]:
        """A prompt as it is encoded, and the white space at its end, which its completion begins with instead."""
        kept = prompt.rstrip(_MOVED) if self.boundary is not None else prompt
        return (kept, prompt[len(kept) :]) if kept else (prompt, "")

    def fields_of(self, prompt: str) -> dict[str, str] | None:
        """The fields that were filled in to make ``prompt``, by their names; None: it is not of this template.

        A field ends where the text after its placeholder first appears. White space at the end may be missing.
        """
        for text in (self.prompt, self.prompt_without_input):
            if text is not None and (found := _unfill(text, prompt)) is not None:
                return found
        return None

    def instruction_prompt(self, text: str) -> str:
        """The prompt of a single user message: ``text`` fills {instruction}, {question}, {user} or {prompt}.

        Without any placeholder ``text`` follows the template. ``SpecError`` if it has several, but none of these.
        """
        names = self.placeholders
        if not names:
            return self.prompt + text
        target = next((name for name in _PROMPT_FIELDS if name in names), None)
        if target is None:
            target, *others = sorted(names)
            if others:
                shown = ", ".join(f"{{{name}}}" for name in (target, *others))
                raise SpecError(f"template {self.name!r} has no place for a prompt", None, f"it has {shown}")
        return self.prompt_of({**dict.fromkeys(names, ""), target: text})

    def misfit(self, row: Row) -> str | None:
        """Which part of ``row`` the template has no place for, as an error message; None: it has a place for all."""
        if row.irregular is not None:
            what, todo = row.irregular.what, "choose a chat template with --template, or take them out of the row"
            return f"the template {self.name!r} has no place for {what}: {todo}"
        if row.turns and self.turn is None:
            return (
                f"the template {self.name!r} has no place for earlier turns (of 'messages', 'conversations' or "
                "'history'): give it a `turn`, or take them out of the row"
            )
        if row.fields.get("system") and "system" in self.unused_fields(row):
            return (
                f"the template {self.name!r} has no place for a system message ('system'): name {{system}} in it, or "
                "take that out of the row"
            )
        return None

    def unused_fields(self, row: Row) -> tuple[str, ...]:
        """The non-empty fields of ``row`` that its prompt does not contain."""
        shown = _names_in(self._prompt_for(row.fields), self.system)
        return tuple(name for name, text in row.fields.items() if text and name not in shown)


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            "alpaca",
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
            prompt_without_input="Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{instruction}\n\n### Response:",
            boundary=BOUNDARY,
        ),
        Template("gsm8k", "Question: {question}\nAnswer:", boundary=BOUNDARY),
        Template("completion", "{prompt}", boundary=BOUNDARY),
        Template("text", ""),
    )
}
"""The built-in templates of rows that are no chats."""


def read_template(path: Path) -> Template:
    """The template in a YAML file: a map of ``prompt`` and optional further texts. ``SpecError`` if it is none."""
    texts = read_yaml(path, scalars_are_texts=True) or {}
    if not isinstance(texts, dict):
        raise SpecError("a template file is a map of names to texts (prompt: ...)", path)
    for name in NOT_IN_FILES:
        if name in texts:
            raise SpecError(f"a template file has no {name!r}", path, "write prompt and optionally other texts")
    return Template.from_dict({"name": path.stem, **texts, "boundary": BOUNDARY}, path, SpecError)


def _check_text(name: str, text: str, where: object, error: type[LlamatuneError]) -> None:
    if len(text) > _LARGEST_TEXT:
        raise error(f"{name!r} of the template has {len(text):,} characters, more than {_LARGEST_TEXT:,}", where)
    if "\0" in text or any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise error(f"{name!r} of the template holds a NUL or a lone surrogate", where)
    if name in ("name", "before_completion", "boundary"):
        return
    try:
        placeholders = {part for literal, part in _parts(text) if not literal}
    except ValueError as fault:
        raise error(str(fault), where, "write {{ and }} for braces") from None
    needed = {"system": {"user", "system"}, "turn": {"user", "assistant"}}.get(name, placeholders)
    if placeholders != needed:
        shown = " and ".join(f"{{{part}}}" for part in sorted(needed, reverse=True))
        raise error(f"{name!r} of a template must hold {shown}, and no other placeholder", where)


@functools.lru_cache(maxsize=256)
def _names_in(*texts: str | None) -> frozenset[str]:
    return frozenset(part for text in texts for literal, part in _parts(text or "") if not literal)


@functools.lru_cache(maxsize=256)
def _parts(text: str) -> tuple[tuple[bool, str], ...]:
    """``text`` split into ``(True, literal)`` and ``(False, field)``; ``ValueError`` at any other brace."""
    parts, end = list[tuple[bool, str]](), 0
    for match in _PLACEHOLDER.finditer(text):
        if match.group() in ("{", "}"):
            raise ValueError(f"{text[match.start() : match.start() + 20]!r} in a template is no {{field}}")
        parts += (True, text[end : match.start()]), (match[1] is None, match[1] or match[0][0])
        end = match.end()
    return (*parts, (True, text[end:]))


def _fill(text: str, fields: Mapping[str, str]) -> str:
    try:
        return "".join(part if literal else fields[part] for literal, part in _parts(text))
    except KeyError as fault:
        raise DataError(f"no field {fault.args[0]!r} for the template", None, f"there is {sorted(fields)}") from None


def _unfill(text: str, filled: str) -> dict[str, str] | None:
    """The fields with which ``_fill`` made ``filled``; None: it did not."""
    parts = list(_parts(text))
    literals = [""]
    names = list[str]()
    for is_literal, part in parts:
        if is_literal:
            literals[-1] += part
        else:
            names.append(part)
            literals.append("")
    literals[-1] = literals[-1].rstrip()
    filled = filled.rstrip() if literals[-1] or not names else filled
    if not filled.startswith(literals[0]) or not filled.endswith(literals[-1]):
        return None
    fields, begin, last = dict[str, str](), len(literals[0]), len(filled) - len(literals[-1])
    for name, after in zip(names, literals[1:], strict=True):
        end = last if after is literals[-1] and len(fields) == len(names) - 1 else filled.find(after, begin, last)
        if end < begin or fields.setdefault(name, filled[begin:end]) != filled[begin:end]:
            return None
        begin = end + len(after)
    return fields if names or begin == len(filled) else None
