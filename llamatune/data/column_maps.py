"""Columns of rows under other names: ``--map FIELD=COLUMN,...``, and presets for data sets that are well known."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llamatune.data.chat_rows import EARLIER
from llamatune.data.raw_row import RowError
from llamatune.data.row_json import kind_of, quote
from llamatune.errors import SpecError

MAPPABLE = (
    "instruction", "input", "output", "system", "history", "question", "answer", "prompt", "completion", "text",
    "messages", "conversations", "tools", "user", "assistant",
)  # fmt: skip
"""Fields that a column can be read as. ``user`` and ``assistant`` make a chat of one turn, or of as many as the lists
that the columns hold."""

_OPTIONAL = ("input", "system", "history", "tools")
_COMPLETIONS = ("output", "answer", "completion", "assistant")

_STEP = re.compile(r"([^.\[\]]+)|\[(\d{1,9})\]")
_FIRST = re.compile(r"[^.\[\]]*")


@dataclass(frozen=True)
class ColumnMap:
    """Fields, each with the column that holds it.

    Args:
        columns: (field, column); a column may be a path into objects and lists, such as ``answers.text[0]``.
        optional: fields whose column may be absent.
        name: of a preset.
        format: that rows have when mapped by a preset.
        holds: the kind of value by which rows are recognised: texts or lists. None: they are not, by themselves.
    """

    columns: tuple[tuple[str, str], ...]
    optional: tuple[str, ...] = ()
    name: str = ""
    format: str = ""
    holds: type | None = str

    @property
    def shown(self) -> str:
        """Its fields and columns, as ``--map`` takes them."""
        return ",".join(f"{field}={column}" for field, column in self.columns)

    @property
    def fields(self) -> set[str]:
        return {field for field, _ in self.columns}

    @property
    def needs(self) -> set[str]:
        """The keys that rows must have."""
        return {column.split(".")[0] for field, column in self.columns if field not in self.optional}

    def with_keys(self, named: Mapping[str, str]) -> str:
        """What to give ``--map`` for rows with keys ``named``, by their lower case: the name if they are as needed."""
        found = {field: named[key] for field, key in self.columns if key in named}
        if found.items() <= set(self.columns):
            return self.name
        return ",".join(f"{field}={key}" for field, key in found.items())

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether rows are recognised as this preset's by ``row``, which has no null values."""
        needed = [row.get(column) for field, column in self.columns if field not in self.optional]
        return self.holds is not None and all(isinstance(value, self.holds) for value in needed)

    def apply(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """``row`` with its columns under the names of fields, and the keys with a value that are lost by that.

        ``RowError`` if it lacks a column that is not optional.
        """
        found = {field: _value(row, column) for field, column in self.columns}
        for field, column in self.columns:
            if found[field] is None and field not in self.optional:
                keys = ", ".join(quote(key) for key in row) or "none"
                what = f"no column {column!r} ({field}={column} of --map); the row has {keys}"
                raise RowError("missing_field", what)
        roots = {_root(row, column) for _, column in self.columns}
        paths = {_root(row, column) for _, column in self.columns if column not in row}
        lost = [key for key in row if key in paths or (key in found and key not in roots and row[key] is not None)]
        made = {key: value for key, value in row.items() if key not in roots and key not in found}
        made |= {field: value for field, value in found.items() if value is not None}
        return _with_messages(made) if "user" in found else made, lost

    def applied_to_prompt(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """As ``apply``, but without null values, and the column of the completion may be absent."""
        made, _ = replace(self, optional=(*self.optional, *_COMPLETIONS)).apply(row)
        if "user" in dict(self.columns):  # of the answer that is absent there is no message
            made["messages"] = [said for said in made["messages"] if said["content"] is not None]
        return {key: value for key, value in made.items() if value is not None}

    def lacking(self, row: Mapping[str, Any]) -> bool:
        """Whether ``row`` has no column, not even null, for an optional field that the user named."""
        return not self.name and any(_root(row, column) not in row for _, column in self.columns)


def _root(row: Mapping[str, Any], column: str) -> str:
    """The key of ``row`` in which a column begins."""
    return column if column in row else _FIRST.match(column)[0]  # type: ignore[index]


def _value(row: Mapping[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for name, index in _STEP.findall(column):
        if name and isinstance(value, dict):
            value = value.get(name)
        elif index and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        else:
            return None
    return value


def _with_messages(row: dict[str, Any]) -> dict[str, Any]:
    """A chat of the texts, or lists of as many texts, in ``user`` and ``assistant``."""
    said = {role: row.pop(role, None) for role in ("user", "assistant")}
    lists = {role: [*text] if isinstance(text, list) else [text] for role, text in said.items()}
    if len(lists["user"]) != len(lists["assistant"]) or len({type(text) is list for text in said.values()}) > 1:
        shown = " and ".join(f"{role} is {_kind_and_length(text)}" for role, text in said.items())
        raise RowError("wrong_type", f"a chat is made of two texts, or of two lists of as many texts; {shown}")
    turns = zip(lists["user"], lists["assistant"], strict=True)
    return {**row, "messages": [{"role": role, "content": text}
                                for pair in turns for role, text in zip(said, pair, strict=True)]}  # fmt: skip


def _kind_and_length(value: object) -> str:
    return f"{kind_of(value)} of {len(value)}" if isinstance(value, list) else kind_of(value)


def _texts(name: str, first: str, second: str, *more: tuple[str, str]) -> ColumnMap:
    columns = (("instruction", first), ("output", second), *more)
    return ColumnMap(columns, tuple(field for field, _ in more), name, "alpaca")


PRESETS = {
    preset.name: preset
    for preset in (
        _texts("dolly", "instruction", "response", ("input", "context")),
        _texts("prompt-response", "prompt", "response"),
        _texts("input-output", "input", "output"),
        _texts("inputs-targets", "inputs", "targets"),
        _texts("query-response", "query", "response"),
        _texts("problem-solution", "problem", "solution"),
        ColumnMap(
            (("system", "system_prompt"), ("user", "question"), ("assistant", "response")),
            ("system",), "openorca", "chat",
        ),
        ColumnMap((("user", "question"), ("assistant", "answer")), (), "question-answer-lists", "chat", list),
        ColumnMap((("user", "questions"), ("assistant", "answers")), (), "questions-answers-lists", "chat", list),
        ColumnMap(((EARLIER, "prompt"), ("messages", "completion")), (), "prompt-completion-messages", "chat", list),
        ColumnMap((("user", "user"), ("assistant", "assistant")), (), "user-assistant", "chat"),
        ColumnMap((("user", "human"), ("assistant", "assistant")), (), "human-assistant", "chat"),
        ColumnMap((("messages", "conversation"),), (), "conversation", "chat", list),
        ColumnMap((("messages", "dialogue"),), (), "dialogue", "chat", list),
        ColumnMap((("messages", "dialog"),), (), "dialog", "chat", list),
        ColumnMap((("messages", "data"),), (), "ultrachat", "chat", None),
        ColumnMap(
            (("instruction", "question"), ("input", "context"), ("output", "answers.text[0]")),
            (), "squad", "alpaca", None,
        ),
    )
}  # fmt: skip
"""By name. All but the last two are recognised in rows that are of no format."""


def preset_of(row: Mapping[str, Any]) -> ColumnMap | None:
    """The only preset that fits a row, which has no null values; None: there is none, or there are several."""
    fitting = [preset for preset in PRESETS.values() if preset.fits(row)]
    return fitting[0] if len(fitting) == 1 else None


def parse_map(text: str, where: str = "--map") -> ColumnMap:
    """The map that ``--map`` gives: a preset's name, or fields and columns. ``SpecError`` if it is none."""
    if text in PRESETS:
        return PRESETS[text]
    columns = dict[str, str]()
    for part in text.split(","):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals:
            what = f"{part.strip()!r} is neither FIELD=COLUMN nor a preset"
            raise SpecError(what, where, f"presets: {', '.join(PRESETS)}")
        if field not in MAPPABLE:
            raise SpecError(f"there is no field {field!r}", where, f"fields: {', '.join(MAPPABLE)}")
        if field in columns:
            raise SpecError(f"the field {field!r} is given twice", where, "keep one of its columns")
        if not column:
            raise SpecError(f"no column for the field {field!r}", where, f"write {field}=COLUMN")
        columns[field] = column
    if ("user" in columns) != ("assistant" in columns):
        raise SpecError("'user' and 'assistant' make a chat together", where, "give a column for both")
    return ColumnMap(tuple(columns.items()), _OPTIONAL)


def advice_for(keys: Iterable[str]) -> str | None:
    """How rows of no known format, with these keys, can be read, if they tell."""
    named = {key.strip().lower(): key for key in keys}
    if {"chosen", "rejected"} <= named.keys():
        return (
            "these are preference pairs; read the chosen answers: --map messages=chosen if they are messages, else "
            "text=chosen, or output=chosen with instruction=COLUMN"
        )
    if {"role", "parent_id"} <= named.keys():
        return "these are messages of a tree; write each path of it as a row with 'messages'"
    for fields in (("instruction", "output"), ("question", "answer"), ("prompt", "completion"), ("text",),
                   ("messages",), ("conversations",)):  # fmt: skip
        if named.keys() >= set(fields) and any(named[field] != field for field in fields):
            more = [field for field in ("input", "system") if field in named and fields[0] == "instruction"]
            return "--map " + ",".join(f"{field}={named[field]}" for field in (*fields, *more))
    fitting = [preset for preset in PRESETS.values() if preset.needs <= named.keys() and EARLIER not in preset.fields]
    return " or ".join(f"--map {preset.with_keys(named)}" for preset in fitting) or None
