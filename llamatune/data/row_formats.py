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

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llamatune.data.chat_rows import read_chat
from llamatune.data.row_parsing import Row, decode_row, is_empty, kind_of, optional_text, quote, text_field, without_nul
from llamatune.data.rows import RawRow, RowError


@dataclass(frozen=True)
class Format:
    """A row format.

    Args:
        name: its name for ``--format``.
        keys: the keys of its prompt and completion.
        prompt_fields: the placeholders that its rows can fill.
        read: the ``Row`` of a JSON object.
        context: optional keys of what precedes the prompt.
    """

    name: str
    keys: tuple[str, ...]
    prompt_fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]
    context: tuple[str, ...] = ()


def parse_row(raw: RawRow, row_format: Format) -> Row:
    """The row in ``raw``.

    Raises:
        RowError: not JSON, not of this format, or with characters that no tokenizer can encode.
    """
    return row_of(decode_row(raw), row_format)


def row_of(row: Mapping[str, Any], row_format: Format) -> Row:
    """``row`` read as ``row_format``; see ``parse_row``."""
    unknown = _unknown_keys(row, row_format, row_format.keys + row_format.context)
    parsed = row_format.read(row)
    return replace(parsed, ignored_keys=unknown + parsed.ignored_keys) if unknown else parsed


def prompt_row_of(row: Mapping[str, Any]) -> Row:
    """``row`` as a prompt, in the format of its keys; the completion may be absent.

    Its fields are all its strings, since a template may use any of them; other values are listed as ignored.
    """
    row_format = next((known for known in FORMATS.values() if _has_a_key_of(row, known)), None)
    if row_format is not None:
        _unknown_keys(row, row_format, row_format.prompt_fields)
        if row_format.name == "chat":
            return read_chat(row, as_prompt=True)
    prompt_fields = () if row_format is None else row_format.prompt_fields
    optional = {name: optional_text(row, name) for name in prompt_fields if name in _OPTIONAL}
    for name in prompt_fields:
        if name in row and name not in _OPTIONAL and not isinstance(row[name], str):
            raise RowError("wrong_type", f"field {name!r} of the row is {kind_of(row[name])}, not a string")
    texts = {key: without_nul(value, key) for key, value in row.items() if isinstance(value, str)}
    turns = _history(row) if row_format is not None and "history" in row_format.context else ()
    return Row({**texts, **optional}, "", turns, tuple(key for key in row if key not in texts))


def _unknown_keys(row: Mapping[str, Any], row_format: Format, names: tuple[str, ...]) -> tuple[str, ...]:
    """The keys that ``row_format`` does not read; ``RowError`` for content and for misspelt ``names``."""
    unknown = tuple(key for key in row if key not in row_format.keys and key not in row_format.context)
    for key in unknown:
        if key in _CONTENT and row_format.prompt_fields and not is_empty(row[key]):
            raise RowError(
                "unread_field",
                f"field {key!r} would be lost: {row_format.name} rows have no place for it; take it out if it may be",
            )
        for name in names:
            if name not in row and _is_misspelling(key, name, row, row_format):
                raise RowError("unknown_field", f"unknown field {quote(key)}, did you mean {name!r}?")
    return unknown


def _is_misspelling(key: str, name: str, row: Mapping[str, Any], row_format: Format) -> bool:
    if name in row_format.context:  # an optional key: only a near misspelling counts
        return _edits(key.lower(), name) <= 1
    if row_format.name == "chat" and any(spelling in row for spelling in row_format.keys):
        return False  # one of the two keys is there, so the other is not missing
    return within_two_edits(key.lower(), name)


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
    return tuple((without_nul(user, "history"), without_nul(answer, "history")) for user, answer in history or ())


def _read_gsm8k(row: Mapping[str, Any]) -> Row:
    return Row({"question": text_field(row, "question")}, text_field(row, "answer"))


def _read_completion(row: Mapping[str, Any]) -> Row:
    return Row({"prompt": text_field(row, "prompt")}, text_field(row, "completion"))


def _read_text(row: Mapping[str, Any]) -> Row:
    return Row({}, text_field(row, "text"))


FORMATS: dict[str, Format] = {
    row_format.name: row_format
    for row_format in (
        Format(
            "alpaca",
            ("instruction", "input", "output"),
            ("instruction", "input", "system"),
            _read_alpaca,
            ("system", "history"),
        ),
        Format("gsm8k", ("question", "answer"), ("question",), _read_gsm8k),
        Format("chat", ("messages", "conversations"), ("user", "system"), read_chat, ("system",)),
        Format("completion", ("prompt", "completion"), ("prompt",), _read_completion),
        Format("text", ("text",), (), _read_text),
    )
}
"""The formats in the order in which ``detect_format`` tries them: an alpaca row may also have a ``text``."""

_DISTINCTIVE_KEYS = {"alpaca": ("instruction",), "gsm8k": ("question",), "chat": ("messages", "conversations")}
_OPTIONAL = ("input", "system")
_CONTENT = {
    "system", "system_prompt", "history", "tools", "functions", "tool_calls", "function_call", "image", "images",
    "video", "videos", "audio", "audios",
}  # fmt: skip
"""Keys under which data sets keep a part of the conversation, in any format but ``text``."""
_ROWS_TRIED = 1000


def detect_format(rows: Iterable[RawRow]) -> Format | None:
    """The format of the first usable row, else of the first row with a distinctive key of a format, else None."""
    likely: Format | None = None
    for number, raw in enumerate(rows):
        if number == _ROWS_TRIED:
            break
        try:
            row = decode_row(raw)
        except RowError:
            continue
        for candidate in FORMATS.values():
            if not _has_a_key_of(row, candidate):
                continue
            likely = likely or candidate
            try:
                row_of(row, candidate)
            except RowError:
                break
            return candidate
    return likely


def _has_a_key_of(row: Mapping[str, Any], row_format: Format) -> bool:
    return any(key in row for key in _DISTINCTIVE_KEYS.get(row_format.name, row_format.keys))


_ANNOTATION = re.compile(r"<<[^<>]*>>")


def strip_annotations(answer: str) -> str:
    """A GSM8K answer without its calculator annotations: ``48/2 = <<48/2=24>>24`` becomes ``48/2 = 24``."""
    return _ANNOTATION.sub("", answer)


def within_two_edits(left: str, right: str) -> bool:
    """Whether at most two insertions, deletions, substitutions or swaps of neighbours make ``left`` into ``right``."""
    return _edits(left, right) <= 2


@functools.lru_cache(maxsize=1024)
def _edits(left: str, right: str) -> int:
    """The number of such edits (Damerau-Levenshtein); if the lengths differ by more than two, that difference."""
    if abs(len(left) - len(right)) > 2:
        return abs(len(left) - len(right))
    before: list[int] = []
    previous = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        current = [i]
        for j, b in enumerate(right, start=1):
            cost = min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
        before, previous = previous, current
    return previous[-1]
