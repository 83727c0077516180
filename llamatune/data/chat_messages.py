"""Messages of chats as data sets have them: roles by other names, contents in parts, tool calls; read to one form."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llamatune.data.raw_row import RowError
from llamatune.data.row_json import checked_text, field_of, is_empty, json_in, kind_of, quote, text_field

CALLER = "function_call"
"""A turn of the assistant whose text is the JSON of its tool calls, in ShareGPT rows."""
ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "bing", "bard"),
    "tool": ("tool", "function", "observation", "ipython", "function_response", "tool_response"),
    CALLER: ("function_call", "tool_call"),
}
"""Roles, and the names that are read as them, in any case and with blanks around them."""
_ROLE_OF = {alias: role for role, aliases in ROLES.items() for alias in aliases}
_PLAIN = {
    "role": {role: role for role in ("system", "user", "assistant", "tool")},
    "from": {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
             "system": "system", "tool": "tool", "observation": "tool", CALLER: CALLER},
}  # fmt: skip
"""What the key of the role has in the two usual forms; another name counts as an alias."""
_TEXT_KEYS = ("content", "value", "text", "parts")

_METADATA = {
    "id", "uuid", "name", "index", "idx", "turn", "turn_identifier", "timestamp", "created", "created_at", "updated_at",
    "date", "time", "lang", "language", "country", "state", "model", "source", "url", "hash", "hashed_ip", "header",
    "toxic", "redacted", "token_count", "num_tokens", "length", "rank", "review_count", "deleted", "synthetic",
    "markdown", "finish_reason", "usage", "system_fingerprint",
}  # fmt: skip
"""Keys of a message that are mere metadata and may be ignored; so may any key that ends in ``_id``."""

TRAINING = ("weight", "train", "training", "trainable", "loss", "learn")
"""Keys by which a message, of the first two the row too, is a target or not: 1 or true, 0 or false."""


class Turn(NamedTuple):
    """A message: its ``role`` is system, user, assistant or tool.

    ``more`` are further keys that only a chat template can use: ``tool_calls`` of the assistant, ``tool_call_id`` and
    ``name`` of a tool. ``is_trained``: it may be a target, if it is the assistant's.
    """

    role: str
    text: str
    is_trained: bool = True
    more: Mapping[str, Any] = {}

    @property
    def message(self) -> dict[str, Any]:
        """As a chat template is given it. A turn that only calls tools has an empty content, since some need one."""
        return {"role": self.role, "content": self.text, **self.more}


def read_turns(value: object, name: str, adjusted: set[str], ignored: set[str]) -> list[Turn]:
    """The messages in the field ``name`` of a row.

    ``adjusted`` gets the kinds of what was not in the usual form, ``ignored`` the keys of messages that are not read.
    Empty system messages are left out.
    """
    if isinstance(value, str):
        value = json_in(value, name)
        adjusted.add("json_in_text")
    if not isinstance(value, list):
        raise RowError("wrong_type", f"field {name!r} of the row is {kind_of(value)}, not a list")
    if value and all(isinstance(text, str) for text in value):
        adjusted.add("turns_without_roles")
        return [_turn_of_text(text, number, name) for number, text in enumerate(value)]
    turns = list[Turn]()
    for number, message in enumerate(value, start=1):
        if (usual := _usual_turn(message)) is not None:
            turns.append(usual)
            continue
        where = f"message {number} of {name!r}"
        if not isinstance(message, dict):
            raise RowError("wrong_type", f"{where} is {kind_of(message)}, not an object")
        if None in message.values():
            message = {key: inner for key, inner in message.items() if inner is not None}
        made = _turns_by_role(message, where, adjusted) or [_turn(message, name, where, adjusted, ignored)]
        turns += [turn for turn in made if turn.role != "system" or turn.text]
    return turns


def _usual_turn(message: object) -> Turn | None:
    """The turn of a message of role and text in the usual form; None: it is another one. Most are, so this is quick."""
    if type(message) is not dict or len(message) != 2:
        return None
    role_key, text_key = ("role", "content") if "role" in message else ("from", "value")
    role, text = message.get(role_key), message.get(text_key)
    if type(role) is not str or type(text) is not str:
        return None
    known = _PLAIN[role_key].get(role)
    if known is None or known == CALLER or not text or text.isspace() or "\0" in text:
        return None
    return Turn(known, text)


def _turn_of_text(text: str, number: int, name: str) -> Turn:
    if not text or text.isspace():
        raise RowError("empty_field", f"message {number + 1} of {name!r} is empty")
    return Turn(("user", "assistant")[number % 2], checked_text(text, name))


def is_trained(holder: Mapping[str, Any], keys: Sequence[str], where: str) -> bool:
    """Whether ``holder`` may be a target: unless one of ``keys`` says 0 or false."""
    stated = {key: holder[key] for key in keys if key in holder and not is_empty(holder[key])}
    for key, value in stated.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError("unread_field", f"{where} has a {key!r} other than 0 and 1, true and false")
    if len({bool(value) for value in stated.values()}) > 1:
        raise RowError("unread_field", f"{where} has {' and '.join(map(repr, stated))}, which contradict each other")
    return all(stated.values())


def _turn(message: Mapping[str, Any], name: str, where: str, adjusted: set[str], ignored: set[str]) -> Turn:
    sharegpt = name == "conversations" if ("role" in message) == ("from" in message) else "from" in message
    role_key = "from" if sharegpt else "role"
    said = text_field(message, role_key, where)
    role = _PLAIN[role_key].get(said)
    if role is None:
        adjusted.add("role_alias")
        role = _ROLE_OF.get(said.strip().lower().replace("-", "_").replace(" ", "_"))
    if role is None:
        raise RowError("bad_messages", f"{where} has the role {quote(said)}; known: system, user, assistant, tool")
    texts = [key for key in _TEXT_KEYS if not is_empty(message.get(key))]
    if len(texts) > 1 and any(message[key] != message[texts[0]] for key in texts):
        shown = " and ".join(map(repr, texts))
        raise RowError("unread_field", f"{where} has {shown}, which differ; one of them would be lost: take it out")
    default = "value" if sharegpt else "content"
    text_key = texts[0] if texts else next((key for key in _TEXT_KEYS if key in message), default)
    more, read = dict[str, Any](), {role_key, *texts, text_key}
    if len(message) > 2 or text_key not in message:
        more = _tool_keys(message, role, where, adjusted)
        read |= {*more, "function_call" if "tool_calls" in more else ""}
        ignored.update(f"{name}[].{key}" for key in _ignored_keys(message, read, where))
    trained = is_trained(message, TRAINING, where)
    if role == CALLER:
        calls = json_in(text_field(message, text_key, where), text_key, where)
        return Turn("assistant", "", trained, {"tool_calls": _calls(calls, where, adjusted, CALLER)})
    text = _text(message, text_key, where, adjusted, may_be_empty=role in ("system", "tool") or "tool_calls" in more)
    if role == "system" and not text.strip():
        adjusted.add("empty_system")
        text = ""
    return Turn(role, text, trained, more)


def _turns_by_role(message: Mapping[str, Any], where: str, adjusted: set[str]) -> list[Turn]:
    """The turns of ``{"human": ..., "assistant": ...}``; none: ``message`` is no such object."""
    if not message or any(key.strip().lower() not in _ROLE_OF or key == CALLER for key in message):
        return []
    named = {_ROLE_OF[key.strip().lower()]: key for key in message}
    if len(named) < len(message) or not named.keys() <= {"system", "user", "assistant"}:
        return []
    adjusted.add("turns_without_roles")
    order = [role for role in ("system", "user", "assistant") if role in named and message[named[role]] != ""]
    return [Turn(role, text_field(message, named[role], where)) for role in order]


def _text(message: Mapping[str, Any], key: str, where: str, adjusted: set[str], *, may_be_empty: bool) -> str:
    """The text of a message: a string, or a list of parts that are texts, one after the other."""
    if may_be_empty and is_empty(message.get(key)) and not isinstance(message.get(key), str):
        return ""
    value = field_of(message, key, where)
    if isinstance(value, list):
        adjusted.add("text_parts")
        message = {key: "".join(_part(part, number, where) for number, part in enumerate(value, start=1))}
    if may_be_empty:
        return checked_text(message[key], key, where)
    return text_field(message, key, where)


def _part(part: object, number: int, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError("wrong_type", f"part {number} of {where} is {kind_of(part)}, not a text or an object")
    kind = part.get("type")
    others = [key for key in part if key not in ("type", "text") and not is_empty(part[key])]
    if kind not in (None, "text", "input_text", "output_text") or others:
        shown = quote(kind) if isinstance(kind, str) and kind != "text" else quote(others[0] if others else "type")
        what = f"part {number} of {where} is no text but has {shown}, which would be lost"
        raise RowError("unread_field", f"{what}; take it out if it may be")
    return checked_text(field_of(part, "text", f"part {number} of {where}"), "text", f"part {number} of {where}")


def _tool_keys(message: Mapping[str, Any], role: str, where: str, adjusted: set[str]) -> dict[str, Any]:
    """What a chat template may read of a message beside its text."""
    if role == "tool":
        return {key: checked_text(message[key], key, where) for key in ("tool_call_id", "name") if message.get(key)}
    calls, single = message.get("tool_calls"), message.get("function_call")
    if role != "assistant" or (is_empty(calls) and is_empty(single)):
        return {}
    if not is_empty(calls) and not is_empty(single):
        raise RowError("unread_field", f"{where} has both 'tool_calls' and 'function_call'; take one of them out")
    if is_empty(calls):
        adjusted.add("function_call")
        return {"tool_calls": _calls(single, where, adjusted, CALLER)}
    if isinstance(calls, str):
        calls = json_in(calls, "tool_calls", where)
        adjusted.add("json_in_text")
    return {"tool_calls": _calls(calls, where, adjusted)}


def _calls(calls: object, where: str, adjusted: set[str], key: str = "tool_calls") -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects. Those of ``function_call`` are one or several functions."""
    bare = key == CALLER
    listed: list[Any] | None = calls if isinstance(calls, list) else [calls] if bare else None
    if not listed or not all(isinstance(call, dict) for call in listed):
        raise RowError("bad_messages", f"{where} has {key!r} that is {kind_of(calls)}, not a list of objects")
    made = list[dict[str, Any]]()
    for call in listed:
        whole = {"type": "function", "function": call} if bare and "function" not in call else dict(call)
        whole = {key: value for key, value in whole.items() if value is not None}
        function = whole.get("function", whole)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("bad_messages", f"{where} has {key!r} without the name of a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(RowError):  # a text that is no object is the argument itself
                parsed = json_in(arguments, "arguments", where)
                if isinstance(parsed, dict):
                    function = {**function, "arguments": parsed}
                    adjusted.add("json_in_text")
        made.append({**whole, "function": function} if "function" in whole else function)
    return made


def _ignored_keys(message: Mapping[str, Any], read: set[str], where: str) -> Iterator[str]:
    """The metadata keys of ``message``; a key that may hold a part of the conversation raises ``RowError``."""
    for key, value in message.items():
        if key in read or key in TRAINING or is_empty(value):
            continue
        if key not in _METADATA and not key.endswith("_id"):
            raise RowError("unread_field", f"{where} has {quote(key)}, which would be lost; take it out if it may be")
        yield key
