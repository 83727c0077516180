"""Chat rows: ``messages`` of ``role`` and ``content``, or ShareGPT's ``conversations`` of ``from`` and ``value``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamatune.data.decoding import Row, kind_of, quote, text_field
from llamatune.data.rows import RowError

_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system",
}  # fmt: skip


def read_chat(row: Mapping[str, Any]) -> Row:
    """A system message or none, then user and assistant in turn, an assistant message last."""
    sharegpt = "conversations" in row
    if sharegpt and "messages" in row:
        raise RowError("bad_messages", "both 'messages' and 'conversations'; a chat row has one of them")
    name, role_key, text_key = ("conversations", "from", "value") if sharegpt else ("messages", "role", "content")
    if name not in row:
        keys = ", ".join(quote(key) for key in row) or "none"
        raise RowError("missing_field", f"no field 'messages'; the row has {keys}")
    messages = row[name]
    if not isinstance(messages, list):
        raise RowError("wrong_type", f"field {name!r} of the row is {kind_of(messages)}, not a list")
    said: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number} of {name!r}"
        if not isinstance(message, dict):
            raise RowError("wrong_type", f"{where} is {kind_of(message)}, not an object")
        role = text_field(message, role_key, where)
        if sharegpt:
            role = _SHAREGPT_ROLES.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise RowError("bad_messages", f"{where} has the role {quote(role)}; known: system, user, assistant")
        said.append((role, text_field(message, text_key, where)))
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
