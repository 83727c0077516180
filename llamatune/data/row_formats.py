"""Row formats: alpaca, gsm8k, chat, completion and text rows, their fields, and format detection.

===========  ==========================================================  ==================
format       a row                                                       completion
===========  ==========================================================  ==================
alpaca       ``instruction``, ``input`` (may be absent), ``output``      ``output``
gsm8k        ``question``, ``answer``                                    ``answer``
chat         ``messages`` of ``role`` and ``content``, or ShareGPT's     the last assistant
             ``conversations`` of ``from`` and ``value``                 message
completion   ``prompt``, ``completion``                                  ``completion``
text         ``text``                                                    all of it
===========  ==========================================================  ==================

An Alpaca row may also have a ``system`` message and a ``history`` of [user, assistant] pairs, a chat row a ``system``.

Rows are checked strictly, because a silently skipped or misread row spoils a training run: fields must be non-empty
strings; a key that looks like a misspelling of an absent field is an error, and so is a key with content for which the
format has no place. Other extra keys are ignored and counted.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llamatune.data.chat_rows import read_chat
from llamatune.data.row_files import RawRow, RowError
from llamatune.data.row_json import Row, checked_text, decode_row, is_empty, optional_text, quote, text_field

_CHATS = ("messages", "conversations")


@dataclass(frozen=True)
class Format:
    """A row format.

    Args:
        name: its name for ``--format``.
        keys: the keys of its prompt and completion.
        prompt_fields: the placeholders that its rows can fill.
        context: optional keys of what precedes the prompt.
        distinctive_keys: a row with one of them is likely of this format.
    """

    name: str
    keys: tuple[str, ...]
    prompt_fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]
    context: tuple[str, ...]
    distinctive_keys: tuple[str, ...]

    def has_key_in(self, row: Mapping[str, Any]) -> bool:
        return any(key in row for key in self.distinctive_keys)


def row_of(row: Mapping[str, Any], row_format: Format) -> Row:
    """The ``Row`` of a JSON object; ``RowError`` if it is not of this format or has a NUL character."""
    unknown = _unknown_keys(row, row_format, row_format.keys + row_format.context)
    parsed = row_format.read(row)
    return replace(parsed, ignored_keys=unknown + parsed.ignored_keys) if unknown else parsed


def prompt_row_of(row: Mapping[str, Any], given: Format | None = None) -> Row:
    """``row`` as a prompt, in the ``given`` format or that of its keys; the completion may be absent.

    Its fields are all its strings, since a template may use any of them; other values are listed as ignored.
    """
    row_format = given or next((known for known in FORMATS.values() if known.has_key_in(row)), None)
    prompt_fields: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()
    if row_format is not None:
        prompt_fields = row_format.prompt_fields
        _unknown_keys(row, row_format, prompt_fields)
        if row_format.name == "chat":
            return read_chat(row, as_prompt=True)
        if row_format.name == "alpaca":
            turns = _history(row)
    optional = {name: optional_text(row, name) for name in prompt_fields if name in _OPTIONAL}
    required = set(prompt_fields) - optional.keys()
    texts = {key: checked_text(text, key) for key, text in row.items() if isinstance(text, str) or key in required}
    if given is not None:
        for name in required or given.keys:
            text_field(row, name)
    completion = texts.get(row_format.keys[-1], "") if row_format is not None and prompt_fields else ""
    return Row({**texts, **optional}, completion, turns, ignored_keys=tuple(key for key in row if key not in texts))


def _unknown_keys(row: Mapping[str, Any], row_format: Format, names: Iterable[str]) -> tuple[str, ...]:
    """The keys that ``row_format`` does not read; ``RowError`` for content and for misspelt ``names``."""
    unknown = tuple(key for key in row if key not in row_format.keys and key not in row_format.context)
    if row_format.name == "chat" and row_format.has_key_in(row):
        names = row_format.context  # one of its two keys is there, so the other is not missing
    for key in unknown:
        if key in _CONTENT and row_format.prompt_fields and not is_empty(row[key]):
            raise RowError(
                "unread_field",
                f"field {key!r} would be lost: {row_format.name} rows have no place for it; take it out if it may be",
            )
        for name in names:
            # Of a key that may be absent only a near misspelling counts.
            if name not in row and within_edits(key.lower(), name, 1 if name in row_format.context else 2):
                raise RowError("unknown_field", f"unknown field {quote(key)}, did you mean {name!r}?")
    return unknown


def _read_alpaca(row: Mapping[str, Any]) -> Row:
    fields = {"instruction": text_field(row, "instruction"), "input": optional_text(row, "input")}
    system = optional_text(row, "system")
    if not is_empty(system):
        fields["system"] = system
    return Row(fields, text_field(row, "output"), _history(row))


def _history(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    history = row.get("history")
    if is_empty(history):
        return ()
    pairs_of_texts = isinstance(history, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)
        for pair in history
    )
    if not pairs_of_texts:
        raise RowError("wrong_type", "field 'history' of the row is not a list of [user, assistant] pairs of texts")
    return tuple((checked_text(user, "history"), checked_text(answer, "history")) for user, answer in history or ())


def _plain_format(name: str, *keys: str) -> Format:
    """A format whose rows have no optional keys; the last key is the completion's."""

    def read(row: Mapping[str, Any]) -> Row:
        return Row({key: text_field(row, key) for key in keys[:-1]}, text_field(row, keys[-1]))

    return Format(name, keys, keys[:-1], read, (), keys)


FORMATS = {
    row_format.name: row_format
    for row_format in (
        Format(
            "alpaca",
            ("instruction", "input", "output"),
            ("instruction", "input", "system"),
            _read_alpaca,
            context=("system", "history"),
            distinctive_keys=("instruction",),
        ),
        replace(_plain_format("gsm8k", "question", "answer"), distinctive_keys=("question",)),
        Format("chat", _CHATS, ("user", "system"), read_chat, context=("system",), distinctive_keys=_CHATS),
        _plain_format("completion", "prompt", "completion"),
        _plain_format("text", "text"),
    )
}
"""The formats in the order in which ``detect_format`` tries them: an alpaca row may also have a ``text``."""

_OPTIONAL = ("input", "system")
_CONTENT = {
    "system", "system_prompt", "history", "tools", "functions", "tool_calls", "function_call", "image", "images",
    "video", "videos", "audio", "audios",
}  # fmt: skip
"""Keys under which data sets keep a part of the conversation, in any format but ``text``."""
ROWS_TRIED = 1000


def detect_format(rows: Iterable[RawRow]) -> Format | None:
    """The format of the first usable row, else of the first row with a distinctive key of a format, else None."""
    likely: Format | None = None
    for raw in itertools.islice(rows, ROWS_TRIED):
        with contextlib.suppress(RowError):
            row = decode_row(raw)
            candidate = next((known for known in FORMATS.values() if known.has_key_in(row)), None)
            likely = likely or candidate
            if candidate is not None:
                row_of(row, candidate)
                return candidate
    return likely


_ANNOTATION = re.compile(r"<<[^<>]*>>")


def strip_annotations(answer: str) -> str:
    """A GSM8K answer without its calculator annotations: ``48/2 = <<48/2=24>>24`` becomes ``48/2 = 24``."""
    return _ANNOTATION.sub("", answer)


@functools.lru_cache(maxsize=4096)
def within_edits(left: str, right: str, most: int) -> bool:
    """Whether ``most`` insertions, deletions, substitutions or swaps of neighbours suffice (Damerau-Levenshtein)."""
    if abs(len(left) - len(right)) > most:
        return False
    if left[:1] == right[:1]:
        return not left or within_edits(left[1:], right[1:], most)
    return most > 0 and (
        within_edits(left[1:], right, most - 1)
        or within_edits(left, right[1:], most - 1)
        or within_edits(left[1:], right[1:], most - 1)
        or (left[:2] == right[1::-1] and within_edits(left[2:], right[2:], most - 1))
    )
