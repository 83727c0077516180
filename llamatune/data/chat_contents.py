"""What a chat template is given beside roles: the texts in messages, tool calls and tools; whether it writes them."""

from __future__ import annotations

import json
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
    if shown is None:
        return None
    return next((name for mark, name in marks.names.items() if mark not in shown and _escaped(mark) not in shown), None)


class _Marks:
    """Marks behind the texts of a conversation, characters that ``text`` has not; ``names`` of what each is behind."""

    def __init__(self, text: str) -> None:
        self.names = dict[str, str]()
        self._unused = (chr(code) for code in range(0x100000, 0x10FFFE) if chr(code) not in text)
        self._asked = False

    def message(self, message: Message, number: int) -> Message:
        self._asked = self._asked or message["role"] == "user"
        marked = dict(message)
        if message.get("content") and (message["role"] != "assistant" or not self._asked or "tool_calls" in message):
            marked["content"] += self._mark(f"{message['role']}'s text of message {number}")
        if "tool_calls" in message:
            name = f"tool calls of message {number}"
            marked["tool_calls"] = [
                self._function(call, lambda function: {
                    **function,
                    "name": function["name"] + self._mark(name),
                    "arguments": with_texts(function.get("arguments"), lambda text: text + self._mark(name)),
                })
                for call in message["tool_calls"]
            ]  # fmt: skip
        return marked

    def tool(self, tool: Any) -> Any:
        def marked(function: dict[str, Any]) -> dict[str, Any]:
            told = {key: function[key] for key in ("name", "description") if isinstance(function.get(key), str)}
            return {**function, **{key: text + self._mark("tools of the row") for key, text in told.items()}}

        return self._function(tool, marked)

    def _function(self, holder: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        function = holder.get("function")
        return {**holder, "function": change(function)} if isinstance(function, dict) else change(holder)

    def _mark(self, name: str) -> str:
        mark = next(self._unused)
        self.names[mark] = name
        return mark


def _is_in(part: str, text: str) -> bool:
    """Whether a template has written ``part``, as it is or as JSON."""
    part = part.strip()
    return part in text or _escaped(part) in text or json.dumps(part, ensure_ascii=False)[1:-1] in text


def _escaped(text: str) -> str:
    return json.dumps(text)[1:-1]
