"""Chat rows: ``messages`` of ``role`` and ``content``, or ShareGPT's ``conversations`` of ``from`` and ``value``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llamatune.data.row_files import RowError
from llamatune.data.row_json import Row, field_of, is_empty, kind_of, optional_text, quote, text_field

_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "system": "system",
}  # fmt: skip

_METADATA = {
    "id", "uuid", "name", "index", "idx", "turn", "turn_identifier", "timestamp", "created", "created_at", "updated_at",
    "date", "time", "lang", "language", "country", "state", "model", "source", "url", "hash", "hashed_ip", "toxic",
    "redacted", "token_count", "num_tokens", "length",
}  # fmt: skip
"""Keys of a message that are mere metadata and may be ignored; so may any key that ends in ``_id``."""

_TRAINING = ("weight", "train", "training", "trainable", "loss", "learn")
"""Keys by which a message, of the first two the row too, is a target or not: 1 or true, 0 or false."""


def read_chat(row: Mapping[str, Any], *, as_prompt: bool = False) -> Row:
    """The ``Row`` of a chat: an optional system message, then user and assistant in turn, an assistant message last.

    The system message may also be the row's field ``system``. ``as_prompt``: the last message may be the user's, and
    the completion is then empty.
    """
    sharegpt = "conversations" in row
    if sharegpt and "messages" in row:
        raise RowError("bad_messages", "both 'messages' and 'conversations'; a chat row has one of them")
    name, role_key, text_key = ("conversations", "from", "value") if sharegpt else ("messages", "role", "content")
    messages = field_of(row, name)
    if not isinstance(messages, list):
        raise RowError("wrong_type", f"field {name!r} of the row is {kind_of(messages)}, not a list")
    if not _is_trained(row, _TRAINING[:2], "the row"):
        key = next(key for key in _TRAINING if not is_empty(row.get(key)))
        raise RowError("unread_field", f"the row has a {key!r} other than 1; take it out if it is not to be trained")
    turns: list[tuple[str, str]] = []
    trained: list[bool] = []
    ignored: set[str] = set()
    for number, message in enumerate(messages, start=1):
        where = f"message {number} of {name!r}"
        if not isinstance(message, dict):
            raise RowError("wrong_type", f"{where} is {kind_of(message)}, not an object")
        if len(message) > 2:
            ignored.update(f"{name}[].{key}" for key in _ignored_keys(message, (role_key, text_key), where))
        role = text_field(message, role_key, where)
        if sharegpt:
            role = _SHAREGPT_ROLES.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise RowError("bad_messages", f"{where} has the role {quote(role)}; known: system, user, assistant")
        turns.append((role, text_field(message, text_key, where)))
        is_trained = _is_trained(message, _TRAINING, where)
        if role == "assistant":
            trained.append(is_trained)
    system, first = "", 1
    if turns and turns[0][0] == "system":
        system, first = turns.pop(0)[1], 2
    for number, (role, _) in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            what = f"message {first + number} of {name!r} is the {role}'s where the {expected}'s is expected"
            raise RowError("bad_messages", what)
    if as_prompt and len(turns) % 2:
        turns.append(("assistant", ""))
    if not turns or len(turns) % 2:
        what = "message of the user" if as_prompt else "assistant message at its end, so there is nothing to train on"
        raise RowError("bad_messages", f"{name!r} has no {what}")
    beside = optional_text(row, "system")
    if not is_empty(beside):
        if system not in ("", beside):
            what = f"both a field 'system' and a system message in {name!r}; leave one of them out"
            raise RowError("bad_messages", what)
        system = beside
    texts = [text for _, text in turns]
    *earlier, (user, answer) = zip(texts[::2], texts[1::2], strict=True)
    fields, flags = {"user": user, "system": system}, () if all(trained) else tuple(trained)
    return Row(fields, answer, tuple(earlier), flags, tuple(sorted(ignored)))


def _ignored_keys(message: Mapping[str, Any], read: tuple[str, str], where: str) -> list[str]:
    """The metadata keys of ``message``; a key that may hold a part of the conversation raises ``RowError``."""
    ignored = [key for key in message if key not in (*read, *_TRAINING) and not is_empty(message[key])]
    for key in ignored:
        if key not in _METADATA and not key.endswith("_id"):
            raise RowError("unread_field", f"{where} has {quote(key)}, which would be lost; take it out if it may be")
    return ignored


def _is_trained(holder: Mapping[str, Any], keys: Sequence[str], where: str) -> bool:
    """Whether ``holder`` may be a target: unless one of ``keys`` says 0 or false."""
    stated = {key: holder[key] for key in keys if key in holder and not is_empty(holder[key])}
    for key, value in stated.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise RowError("unread_field", f"{where} has a {key!r} other than 0 and 1, true and false")
    if len({bool(value) for value in stated.values()}) > 1:
        raise RowError("unread_field", f"{where} has {' and '.join(map(repr, stated))}, which contradict each other")
    return all(stated.values())
