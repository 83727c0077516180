"""Row formats: which fields a row has, and what of it is prompt and what completion.

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

Rows are checked strictly, because a silently skipped or misread row costs a training run: fields must be non-empty
strings, and a key that looks like a misspelt field is an error. Other extra keys are ignored and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llamatune.data.rows import RawRow, RowError
from llamatune.files import parse_json

_LONGEST_QUOTE = 80
_DEEPEST = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row.

    Args:
        fields: what a template's placeholders may name.
        completion: the text to be learned.
        turns: earlier (user, assistant) turns of a chat, oldest first.
        ignored_keys: keys of the row that no format knows.
    """

    fields: dict[str, str]
    completion: str
    turns: tuple[tuple[str, str], ...] = ()
    ignored_keys: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Format:
    """A row format. ``prompt_fields`` are the placeholders that its rows can fill; ``keys`` all the keys it reads."""

    name: str
    keys: tuple[str, ...]
    prompt_fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]


def parse_row(raw: RawRow, row_format: Format) -> Row:
    """The row that ``raw`` holds.

    Raises:
        RowError: not JSON, not of this format, or with characters that no tokenizer can take.
    """
    return row_of(decode_row(raw), row_format)


def row_of(row: Mapping[str, Any], row_format: Format) -> Row:
    """``row`` read as ``row_format``; see ``parse_row``."""
    unknown = [key for key in row if key not in row_format.keys]
    for key in unknown:
        for known in row_format.keys:
            if within_two_edits(key, known):
                raise RowError("unknown_field", f"unknown field {_quote(key)}, did you mean {known!r}?")
    made = row_format.read(row)
    if unknown:
        return Row(made.fields, made.completion, made.turns, tuple(unknown))
    return made


def decode_row(raw: RawRow) -> dict[str, Any]:
    """The JSON object that ``raw`` holds, checked but not yet of any format; raises ``RowError``."""
    if raw.error is not None:
        raise raw.error
    nul = raw.data.find(b"\0")
    if nul >= 0:
        raise RowError("nul_bytes", f"a NUL byte at byte {raw.offset + nul} of the file (a write that was cut off?)")
    try:
        text = raw.data.decode()
    except UnicodeDecodeError as fault:
        byte, at = raw.data[fault.start], raw.offset + fault.start
        raise RowError(
            "not_utf8", f"byte 0x{byte:02x} at byte {at} of the file is not UTF-8 (Latin-1 text? iconv converts it)"
        ) from None
    try:
        value = parse_json(text)
    except json.JSONDecodeError as fault:
        # The parser counts lines and columns from the row's own beginning, so only the column of a one-line row holds.
        place = f"column {fault.colno}" if fault.lineno == 1 else f"line {fault.lineno} of the row"
        raise RowError("not_json", f"not valid JSON: {fault.msg} at {place}") from None
    except ValueError as fault:
        raise _value_fault(str(fault), text) from None
    except RecursionError:
        raise RowError("not_json", "nested too deeply") from None
    if text.count("[") + text.count("{") > _DEEPEST and _deeper_than(value, _DEEPEST):
        # Where the parser gives up depends on the stack above it, which differs between us and a worker.
        raise RowError("not_json", "nested too deeply")
    if not isinstance(value, dict):
        raise RowError("not_an_object", f"{_kind_of(value)} where a row, a JSON object, is expected")
    return value


def _deeper_than(value: object, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(inner, (dict, list)) for inner in level)


def _value_fault(message: str, text: str) -> RowError:
    if "surrogate" in message:
        value = json.loads(text)
        for key, content in value.items() if isinstance(value, dict) else ():
            try:
                json.dumps([key, content], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return RowError("bad_characters", f"a lone surrogate, which is no character, in field {_quote(key)}")
        return RowError("bad_characters", message)
    if "digits" in message:
        return RowError("not_json", "not usable JSON: an integer of thousands of digits")
    if "twice" in message:
        return RowError("duplicate_key", message)
    return RowError("not_json", f"not usable JSON: {message}")


def _text_field(row: Mapping[str, Any], name: str, where: str = "the row") -> str:
    if name not in row:
        keys = ", ".join(_quote(key) for key in row) or "none"
        raise RowError("missing_field", f"no field {name!r}; {where} has {keys}")
    value = row[name]
    if not isinstance(value, str):
        raise RowError("wrong_type", f"field {name!r} of {where} is {_kind_of(value)}, not a string")
    if not value or value.isspace():
        raise RowError("empty_field", f"field {name!r} of {where} is empty")
    return _without_nul(value, name)


def _without_nul(value: str, name: str) -> str:
    if "\0" in value:
        raise RowError("bad_characters", f"a NUL character in field {name!r}")
    return value


def _read_alpaca(row: Mapping[str, Any]) -> Row:
    instruction = _text_field(row, "instruction")
    context = row.get("input")
    if context is None:  # absent, or null as pandas writes it
        context = ""
    if not isinstance(context, str):
        raise RowError("wrong_type", f"field 'input' of the row is {_kind_of(context)}, not a string")
    completion = _text_field(row, "output")
    return Row({"instruction": instruction, "input": _without_nul(context, "input")}, completion)


def _read_gsm8k(row: Mapping[str, Any]) -> Row:
    return Row({"question": _text_field(row, "question")}, _text_field(row, "answer"))


def _read_completion(row: Mapping[str, Any]) -> Row:
    return Row({"prompt": _text_field(row, "prompt")}, _text_field(row, "completion"))


def _read_text(row: Mapping[str, Any]) -> Row:
    return Row({}, _text_field(row, "text"))


_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system",
}  # fmt: skip


def _read_chat(row: Mapping[str, Any]) -> Row:
    """A system message or none, then user and assistant in turn, an assistant message last."""
    sharegpt = "conversations" in row
    if sharegpt and "messages" in row:
        raise RowError("bad_messages", "both 'messages' and 'conversations'; a chat row has one of them")
    name, role_key, text_key = ("conversations", "from", "value") if sharegpt else ("messages", "role", "content")
    if name not in row:
        keys = ", ".join(_quote(key) for key in row) or "none"
        raise RowError("missing_field", f"no field 'messages'; the row has {keys}")
    messages = row[name]
    if not isinstance(messages, list):
        raise RowError("wrong_type", f"field {name!r} of the row is {_kind_of(messages)}, not a list")
    said: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number} of {name!r}"
        if not isinstance(message, dict):
            raise RowError("wrong_type", f"{where} is {_kind_of(message)}, not an object")
        role = _text_field(message, role_key, where)
        if sharegpt:
            role = _SHAREGPT_ROLES.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise RowError("bad_messages", f"{where} has the role {_quote(role)}; known: system, user, assistant")
        said.append((role, _text_field(message, text_key, where)))
    system = said.pop(0)[1] if said and said[0][0] == "system" else ""
    for number, (role, _) in enumerate(said):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            at = number + (2 if system else 1)
            raise RowError(
                "bad_messages", f"message {at} of {name!r} is the {role}'s where the {expected}'s is expected"
            )
    if not said or len(said) % 2:
        raise RowError("bad_messages", f"{name!r} has no assistant message at its end, so there is nothing to learn")
    pairs = tuple((said[i][1], said[i + 1][1]) for i in range(0, len(said), 2))
    return Row({"user": pairs[-1][0], "system": system}, pairs[-1][1], pairs[:-1])


FORMATS: dict[str, Format] = {
    made.name: made
    for made in (
        Format("alpaca", ("instruction", "input", "output"), ("instruction", "input"), _read_alpaca),
        Format("gsm8k", ("question", "answer"), ("question",), _read_gsm8k),
        Format("chat", ("messages", "conversations"), ("user", "system"), _read_chat),
        Format("completion", ("prompt", "completion"), ("prompt",), _read_completion),
        Format("text", ("text",), (), _read_text),
    )
}
"""The formats in the order in which ``detect_format`` tries them: an alpaca row may carry a ``text`` too."""

_TELLING = {"alpaca": ("instruction",), "gsm8k": ("question",), "chat": ("messages", "conversations")}
_ROWS_LOOKED_AT = 1000


def detect_format(rows: Iterable[RawRow]) -> Format | None:
    """The format of the first usable row, else of the first row that has at least a telling key, else None."""
    likely: Format | None = None
    for number, raw in enumerate(rows):
        if number == _ROWS_LOOKED_AT:
            break
        try:
            row = decode_row(raw)
        except RowError:
            continue
        for candidate in FORMATS.values():
            if not any(key in row for key in _TELLING.get(candidate.name, candidate.keys)):
                continue
            likely = likely or candidate
            try:
                row_of(row, candidate)
            except RowError:
                break
            return candidate
    return likely


_ANNOTATION = re.compile(r"<<[^<>]*>>")


def strip_annotations(answer: str) -> str:
    """A GSM8K answer without its calculator notes: ``48/2 = <<48/2=24>>24`` becomes ``48/2 = 24``."""
    return _ANNOTATION.sub("", answer)


def within_two_edits(left: str, right: str) -> bool:
    """Whether at most two insertions, deletions, substitutions or swaps of neighbours make ``left`` into ``right``."""
    if abs(len(left) - len(right)) > 2:
        return False
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
    return previous[-1] <= 2


def _quote(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "...")


def _kind_of(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number")
