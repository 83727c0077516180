"""What a chat template is given beside roles: the texts in messages, tool calls and tools; whether it writes them."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llamatune.data.jinja_engine import Message


def texts_in(value: object) -> Iterator[str]:
    """Every string in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from texts_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from texts_in(inner)


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string in it changed, keys of objects included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): with_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_texts(inner, change) for inner in value]
    return value


def left_out(
    messages: Sequence[Message],
    tools: Sequence[Any],
    text: str,
    render: Callable[..., str | None],
    marker: str,
    *,
    odd: bool,
) -> str | None:
    """Which part of a conversation its rendering ``text`` lacks; None: none.

    The assistant's turns behind the user's first are not looked for, unless they call tools: a template may write
    them in another way. ``odd``: the conversation is more than turns of user and assistant. It is then rendered again
    by ``render(messages, tools)``, each part with a mark; None: the template refuses that. ``marker`` is a character
    that stands within special tokens' texts, if there are any.
    """
    if marker and _escaped(marker) in text:
        return "text of a special token as it is"
    for number, message in enumerate(messages, start=1):
        if message["role"] != "assistant" and not _is_in(message.get("content", ""), text):
            return f"{message['role']}'s text of message {number}"
    if not odd:
        return None
    marks = _Marks(text)
    marked = [marks.message(message, number) for number, message in enumerate(messages, start=1)]
    shown = render(marked, [marks.tool(tool) for tool in tools])
    return None if shown is None else marks.missing(shown)


class _Marks:
    """Marks behind the texts of a conversation: for each of its parts a character that ``text`` has not."""

    def __init__(self, text: str) -> None:
        self._unused = (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in text)
        self._marks, self._uses, self._asked = dict[str, str](), Counter[str](), False

    def missing(self, shown: str) -> str | None:
        """The first part of which a text is not in ``shown``; None: all are."""
        for name, mark in self._marks.items():
            if mark and shown.count(mark) + shown.count(_escaped(mark)) < self._uses[name]:
                return name
        return None

    def message(self, message: Message, number: int) -> Message:
        self._asked = self._asked or message["role"] == "user"
        marked = dict(message)
        if message.get("content") and (message["role"] != "assistant" or not self._asked or "tool_calls" in message):
            marked["content"] = self._marked(f"{message['role']}'s text of message {number}", message["content"])
        if "tool_calls" in message:
            marked["tool_calls"] = [
                self._in_function(f"tool calls of message {number}", call, ("name", "arguments"))
                for call in message["tool_calls"]
            ]
        return marked

    def tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        return self._in_function("tools of the row", tool, ("name", "description"))

    def _in_function(self, name: str, holder: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
        function = holder.get("function", holder)
        if not isinstance(function, dict):
            return holder
        changed = {
            key: with_texts(function[key], functools.partial(self._marked, name)) for key in keys if key in function
        }
        return {**holder, "function": {**function, **changed}} if "function" in holder else {**holder, **changed}

    def _marked(self, name: str, text: str) -> str:
        if name not in self._marks:
            self._marks[name] = next(self._unused, "")
        self._uses[name] += 1
        return text + self._marks[name]


def _is_in(part: str, text: str) -> bool:
    """Whether a template has written ``part``, as it is or as JSON."""
    part = part.strip()
    return part in text or _escaped(part) in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def _escaped(text: str) -> str:
    return json.dumps(text)[1:-1]
