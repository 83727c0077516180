"""JSON of a row: its bytes decoded to a checked object, and checks of its text fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llamatune.data.raw_row import RawRow, RowError
from llamatune.strict_json import SyntaxFault, parse_json

_LONGEST_QUOTE = 80
_DEEPEST = 100


@dataclass(frozen=True, slots=True)
class Irregular:
    """What of a chat is more than turns of user and assistant, so that only a chat template has a place for it.

    Args:
        what: its name, for errors.
        messages: all that precede the completion.
        answer: further keys of the assistant's last message, such as ``tool_calls``.
        tools: the tools that it may call.
    """

    what: str
    messages: tuple[dict[str, Any], ...]
    answer: Mapping[str, Any]
    tools: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row.

    Args:
        fields: what a template's placeholders may name.
        completion: the text to be trained.
        turns: earlier (user, assistant) turns of a chat, oldest first.
        trained: whether each text of the assistant may be a target, the completion last; empty: all may.
        ignored_keys: keys of the row that its format does not read.
        irregular: a chat that is more than turns; it has no ``turns`` then.
        adjusted: kinds of what was read though it was not in the usual form.
    """

    fields: dict[str, str]
    completion: str
    turns: tuple[tuple[str, str], ...] = ()
    trained: tuple[bool, ...] = ()
    ignored_keys: tuple[str, ...] = field(default=(), compare=False)
    irregular: Irregular | None = None
    adjusted: tuple[str, ...] = field(default=(), compare=False)


def decode_row(raw: RawRow) -> dict[str, Any]:
    """The JSON object in ``raw``, of any format; raises ``RowError``."""
    value = decode_value(raw)
    if not isinstance(value, dict):
        raise RowError("not_an_object", f"{kind_of(value)} where a row, a JSON object, is expected")
    return value


def decode_value(raw: RawRow) -> Any:
    """The JSON value in ``raw``, of any type; raises ``RowError``."""
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
    except SyntaxFault as fault:
        # The parser counts lines and columns from the row's beginning; the column is the file's only on its first line.
        place = f"column {fault.column}" if fault.line == 1 else f"line {fault.line} of the row"
        raise RowError("not_json", f"not valid JSON: {fault.why} at {place}") from None
    except ValueError as fault:
        raise _value_fault(str(fault), text) from None
    except RecursionError:
        raise RowError("not_json", "nested too deeply") from None
    if text.count("[") + text.count("{") > _DEEPEST and _deeper_than(value, _DEEPEST):
        # The parser's own limit depends on the depth of the call stack, which differs in a worker process.
        raise RowError("not_json", "nested too deeply")
    return value


def json_in(text: str, name: str, where: str = "the row") -> Any:
    """The JSON value in the text of field ``name``; raises ``RowError``."""
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as fault:
        what = f"field {name!r} of {where} is a string, but not of JSON: {fault}"
        raise RowError("wrong_type", what[: 4 * _LONGEST_QUOTE]) from None
    if _deeper_than(value, _DEEPEST):
        raise RowError("not_json", f"field {name!r} of {where} is nested too deeply")
    return value


def _deeper_than(value: object, depth: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    if depth == 0:
        return True
    return any(_deeper_than(inner, depth - 1) for inner in (value.values() if isinstance(value, dict) else value))


def _value_fault(message: str, text: str) -> RowError:
    if "surrogate" in message:
        value = json.loads(text)
        for key, content in value.items() if isinstance(value, dict) else ():
            try:
                json.dumps([key, content], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                return RowError("bad_characters", f"a lone surrogate, which is no character, in field {quote(key)}")
        return RowError("bad_characters", message)
    if "twice" in message:
        return RowError("duplicate_key", message)
    return RowError("not_json", f"not usable JSON: {message}")


def field_of(row: Mapping[str, Any], name: str, where: str = "the row") -> Any:
    """The value of field ``name``; ``RowError`` if it is absent."""
    if name not in row:
        keys = ", ".join(quote(key) for key in row) or "none"
        raise RowError("missing_field", f"no field {name!r}; {where} has {keys}")
    return row[name]


def text_field(row: Mapping[str, Any], name: str, where: str = "the row") -> str:
    """The text of field ``name``; ``RowError`` if it is absent, not a text, or blank."""
    value = field_of(row, name, where)
    if isinstance(value, list) and where == "the row":
        what = f"field {name!r} of the row is a list, not a string"
        raise RowError("wrong_type", what, f"; one of it can be taken, with --map {name}={name}[0]")
    text = checked_text(value, name, where)
    if not text or text.isspace():
        raise RowError("empty_field", f"field {name!r} of {where} is empty")
    return text


def optional_text(row: Mapping[str, Any], name: str) -> str:
    """The text of field ``name``; empty if it is absent, null (pandas writes it), or an empty list or object."""
    value = row.get(name)
    return "" if value is None or value == [] or value == {} else checked_text(value, name)


def checked_text(value: Any, name: str, where: str = "the row") -> str:
    """``value``; ``RowError`` if it is no string or contains a NUL character, which no tokenizer can encode."""
    if not isinstance(value, str):
        raise RowError("wrong_type", f"field {name!r} of {where} is {kind_of(value)}, not a string")
    if "\0" in value:
        raise RowError("bad_characters", f"a NUL character in field {name!r}")
    return value


def is_empty(value: object) -> bool:
    """Whether ``value`` is null, or an empty string, list or object (also one spelled ``[]`` or ``{}`` in a string)."""
    return value is None or value in ([], {}) or (isinstance(value, str) and value.strip() in ("", "[]", "{}"))


def quote(text: str) -> str:
    """A name from a row in quotes, shortened if it is long."""
    return repr(text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "...")


def kind_of(value: object) -> str:
    """The JSON type of ``value``, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number"}
    return "null" if value is None else names.get(type(value), "a number")
