"""Chat rows: their messages as turns of user and assistant, or as a conversation for a chat template alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llamatune.data.chat_messages import TRAINING, Turn, is_trained, read_turns
from llamatune.data.raw_row import RowError
from llamatune.data.row_json import Irregular, Row, field_of, is_empty, json_in, kind_of, optional_text

_TAKING_TURNS = ("user", "assistant")
EARLIER = "earlier messages"
"""Not a field of a file: messages before those of ``messages``, none of them a target."""


def read_chat(row: Mapping[str, Any], *, as_prompt: bool = False) -> Row:
    """The ``Row`` of a chat. The assistant's last message is the completion.

    Two messages of one role are joined by an empty line. The system message may also be the row's field ``system``.
    ``as_prompt``: the messages may end with another's, and the completion is then empty.
    """
    given = [key for key in ("messages", "conversations") if not is_empty(row.get(key))]
    if len(given) > 1:
        raise RowError("bad_messages", "both 'messages' and 'conversations'; a chat row has one of them")
    name = given[0] if given else "conversations" if "conversations" in row else "messages"
    if not is_trained(row, TRAINING[:2], "the row"):
        key = next(key for key in TRAINING if not is_empty(row.get(key)))
        raise RowError("unread_field", f"the row has a {key!r} other than 1; take it out if it is not to be trained")
    adjusted, ignored = set[str](), set[str]()
    turns = read_turns(field_of(row, name), name, adjusted, ignored)
    if earlier := row.get(EARLIER):
        context = read_turns(earlier, "prompt", adjusted, ignored)
        turns = [*(turn._replace(is_trained=False) for turn in context), *turns]
    tools = _tools(row, adjusted)
    if as_prompt or not _is_regular(turns):
        turns = _until_answer(_joined(turns, name, adjusted), name, as_prompt, adjusted)
    turns = _with_system(turns, optional_text(row, "system"), name)
    if not tools and _is_regular(turns):
        made = _regular_row(turns)
    else:
        user = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
        if user is None:
            raise RowError("bad_messages", f"{name!r} has no message of the user before the assistant's")
        turns = [turn._replace(is_trained=False) if n < user else turn for n, turn in enumerate(turns)]
        made = _irregular_row(turns, tools, adjusted)
    if not adjusted and not ignored:
        return made
    return replace(made, ignored_keys=tuple(sorted(ignored)), adjusted=tuple(sorted(adjusted)))


def read_history(row: Mapping[str, Any], adjusted: set[str], ignored: set[str]) -> tuple[tuple[str, str], ...]:
    """The earlier turns in the field ``history``: pairs of [user, assistant], or messages as chats have them.

    ``adjusted`` and ``ignored`` are as of ``read_turns``.
    """
    history = row.get("history")
    if is_empty(history):
        return ()
    if isinstance(history, str):
        history = json_in(history, "history")
        adjusted.add("json_in_text")
    turns = list[Turn]()
    if isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        texts = [text for pair in history for text in pair]
        if all(isinstance(text, str) for text in texts):
            turns = read_turns(texts, "history", set(), ignored)
    elif isinstance(history, list) and not any(isinstance(pair, list) for pair in history):
        turns = read_turns(history, "history", adjusted, ignored)
    plain = all(turn.role == _TAKING_TURNS[n % 2] and not turn.more for n, turn in enumerate(turns))
    if not turns or len(turns) % 2 or not plain:
        raise RowError("wrong_type", "field 'history' of the row is not a list of [user, assistant] pairs of texts")
    said = [turn.text for turn in turns]
    return tuple(zip(said[::2], said[1::2], strict=True))


def _tools(row: Mapping[str, Any], adjusted: set[str]) -> list[Any]:
    tools = row.get("tools")
    if is_empty(tools):
        return []
    if isinstance(tools, str):
        tools = json_in(tools, "tools")
        adjusted.add("json_in_text")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("wrong_type", f"field 'tools' of the row is {kind_of(tools)}, not a list of objects")
    return tools


def _joined(turns: Sequence[Turn], name: str, adjusted: set[str]) -> list[Turn]:
    """Turns of one role in a row made one, but tools' turns and those that call tools."""
    joined = list[Turn]()
    for turn in turns:
        last = joined[-1] if joined else None
        if last is None or last.role != turn.role or turn.role == "tool" or last.more or turn.more:
            joined.append(turn)
            continue
        if turn.role == "assistant" and last.is_trained != turn.is_trained:
            what = f"two of the assistant's messages in a row in {name!r}, of which one alone is to be trained"
            raise RowError("bad_messages", f"{what}; put the user's between them, or train both")
        joined[-1] = last._replace(text=f"{last.text}\n\n{turn.text}")
        adjusted.add("turns_joined")
    return joined


def _until_answer(turns: list[Turn], name: str, as_prompt: bool, adjusted: set[str]) -> list[Turn]:
    """The turns up to the assistant's last one; of a prompt up to its last one that is none of the assistant's."""
    if as_prompt:
        answer = ""
        if turns and turns[-1].role == "assistant":
            *turns, last = turns
            answer = last.text
        if not any(turn.role == "user" for turn in turns):
            raise RowError("bad_messages", f"{name!r} has no message of the user")
        return [*turns, Turn("assistant", answer)]
    end = max((n for n, turn in enumerate(turns, start=1) if turn.role == "assistant"), default=0)
    if not end:
        what = "no assistant message at its end, so there is nothing to train on"
        raise RowError("bad_messages", f"{name!r} has {what}")
    if end < len(turns):
        adjusted.add("trailing_turns")
    return turns[:end]


def _with_system(turns: list[Turn], beside: str, name: str) -> list[Turn]:
    """The turns, with the row's field ``system`` as the first one."""
    if is_empty(beside):
        return turns
    if turns[0].role != "system":
        return [Turn("system", beside), *turns]
    if turns[0].text != beside:
        what = f"both a field 'system' and a system message in {name!r}; leave one of them out"
        raise RowError("bad_messages", what)
    return turns


def _is_regular(turns: Sequence[Turn]) -> bool:
    """Whether they are an optional system message, then turns of user and assistant, without anything more."""
    said = turns[1:] if turns and turns[0].role == "system" else turns
    return (
        bool(said)
        and len(said) % 2 == 0
        and all(turn.role == _TAKING_TURNS[n % 2] and not turn.more for n, turn in enumerate(said))
    )


def _regular_row(turns: Sequence[Turn]) -> Row:
    system, said = (turns[0].text, turns[1:]) if turns[0].role == "system" else ("", turns)
    texts = [turn.text for turn in said]
    *earlier, (user, answer) = zip(texts[::2], texts[1::2], strict=True)
    return Row({"user": user, "system": system}, answer, tuple(earlier), _flags(said))


def _irregular_row(turns: Sequence[Turn], tools: list[Any], adjusted: set[str]) -> Row:
    *before, answer = turns
    said = turns[1:] if turns[0].role == "system" else turns
    found = {
        "tools": bool(tools) or any(turn.more or turn.role == "tool" for turn in turns),
        "leading_assistant": said[0].role == "assistant",
        "later_system": any(turn.role == "system" for turn in said),
    }
    adjusted.update(kind for kind, is_found in found.items() if is_found)
    what = " and ".join(_IRREGULAR[kind] for kind, is_found in found.items() if is_found)
    user = next(turn.text for turn in reversed(before) if turn.role == "user")
    system = before[0].text if before[0].role == "system" else ""
    more = {key: value for key, value in answer.message.items() if key not in ("role", "content")}
    irregular = Irregular(what, tuple(turn.message for turn in before), more, tuple(tools))
    return Row({"user": user, "system": system}, answer.text, (), _flags(turns), irregular=irregular)


_IRREGULAR = {
    "tools": "tools and their turns",
    "leading_assistant": "a turn of the assistant before the user's first",
    "later_system": "a system message after the first turn",
}
"""What a prompt template has no place for."""


def _flags(turns: Sequence[Turn]) -> tuple[bool, ...]:
    flags = tuple(turn.is_trained for turn in turns if turn.role == "assistant")
    return () if all(flags) else flags
