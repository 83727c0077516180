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

An Alpaca row may also have a ``system`` message and a ``history`` of [user, assistant] pairs, a chat row a ``system``
and ``tools``.

Rows are checked strictly, because a silently skipped or misread row spoils a training run: fields must be non-empty
strings; a key that looks like a misspelling of an absent field is an error, and so is a key with content for which the
format has no place. Other extra keys are ignored and counted. A null value counts as absent. Rows of no format are read
by the preset of ``column_maps`` that alone fits them.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llamatune.data.chat_rows import EARLIER, read_chat, read_history
from llamatune.data.column_maps import ColumnMap, advice_for, preset_of
from llamatune.data.misspellings import within_edits
from llamatune.data.raw_row import RawRow, RowError
from llamatune.data.row_json import Row, checked_text, decode_row, is_empty, optional_text, quote, text_field
from llamatune.errors import DataError, SpecError

_CHATS = ("messages", "conversations")


@dataclass(frozen=True)
class Format:
    """A row format.

    Args:
        name: its name for ``--format``.
        keys: the keys of its prompt and completion.
        prompt_fields: the placeholders that its rows can fill.
        context: optional keys of what precedes the prompt.
        distinctive_keys: a row with one of them is likely of this format.
        required: the keys that all its rows have; of a chat one of them.
    """

    name: str
    keys: tuple[str, ...]
    prompt_fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]
    context: tuple[str, ...]
    distinctive_keys: tuple[str, ...]
    required: tuple[str, ...]

    def has_key_in(self, row: Mapping[str, Any]) -> bool:
        """Whether ``row``, without null values, has a distinctive key."""
        return any(key in row for key in self.distinctive_keys)

    def is_satisfied_by(self, row: Mapping[str, Any]) -> bool:
        """Whether ``row``, without null values, has what the format requires, of about the right kind."""
        if self.name == "chat":
            return any(row.get(key) for key in _CHATS)
        return all(key in row and not isinstance(row[key], (list, dict)) for key in self.required)


def row_of(row: Mapping[str, Any], row_format: Format, columns: ColumnMap | None = None) -> Row:
    """The ``Row`` of a JSON object; ``RowError`` if it is not of this format or has a NUL character.

    ``columns``: its columns that stand for fields.
    """
    meant, lost, adjusted = _meant(row, row_format, columns)
    try:
        unknown = _unknown_keys(meant, row_format, row_format.keys + row_format.context)
        parsed = row_format.read(meant)
    except RowError as fault:
        if fault.kind != "missing_field":
            raise
        nulls = ", ".join(quote(key) for key, value in row.items() if value is None)
        advice = None if columns else advice_for(meant)
        shown = f"{fault.message} (null: {nulls})" if nulls else fault.message
        raise RowError(fault.kind, shown, f"; {advice}" if advice else "") from None
    if not (unknown or lost or adjusted):
        return parsed
    ignored = (*unknown, *lost, *parsed.ignored_keys)
    return replace(parsed, ignored_keys=ignored, adjusted=(*parsed.adjusted, *adjusted))


def _meant(
    row: Mapping[str, Any], row_format: Format, columns: ColumnMap | None
) -> tuple[Mapping[str, Any], list[str], list[str]]:
    """``row`` without null values, its columns named as fields; the keys lost by that; and kinds of adjustment."""
    lost, adjusted = list[str](), list[str]()
    if columns is not None:
        if columns.lacking(row):
            adjusted.append("no_column")
        row, lost = columns.apply(row)
    if None in row.values():
        row = {key: value for key, value in row.items() if value is not None}
    if row_format.is_satisfied_by(row):
        return row, lost, adjusted
    preset = preset_of(row) if columns is None else None
    if preset is not None and preset.format == row_format.name:
        made, displaced = preset.apply(row)
        return made, displaced, [f"preset_{preset.name}"]
    singles = [key for key in row_format.required if _is_single(row.get(key)) and row_format.name != "chat"]
    return {**row, **{key: row[key][0] for key in singles}}, lost, [*adjusted, *["list_of_one"] * bool(singles)]


def _is_single(value: object) -> bool:
    return isinstance(value, list) and len(value) == 1 and isinstance(value[0], str)


def prompt_row_of(row: Mapping[str, Any], given: Format | None = None, columns: ColumnMap | None = None) -> Row:
    """``row`` as a prompt, in the ``given`` format or that of its keys; the completion may be absent.

    Its fields are all its strings, since a template may use any of them; other values are listed as ignored.
    """
    row = columns.applied_to_prompt(row) if columns else {key: value for key, value in row.items() if value is not None}
    satisfied = _satisfied(row) if given is None else [given]
    if len(satisfied) > 1:
        names = " or ".join(f"--format {known.name}" for known in satisfied)
        raise RowError("two_formats", f"{_two(satisfied)}; choose with {names}")
    if not satisfied and columns is None and (preset := preset_of(row)) is not None:
        satisfied = [FORMATS[preset.format]]
    if given is None and satisfied in ([], [FORMATS["text"]]):  # a completion may be absent
        satisfied = [known for known in FORMATS.values() if known.has_key_in(row)]
    row_format = next(iter(satisfied), None)
    if row_format is not None:
        row = row if columns else _meant(row, row_format, None)[0]
        _unknown_keys(row, row_format, row_format.prompt_fields)
        if row_format.name == "chat":
            return read_chat(row, as_prompt=True)
    prompt_fields = () if row_format is None else row_format.prompt_fields
    turns = read_history(row, set(), set()) if row_format is FORMATS["alpaca"] else ()
    optional = {name: optional_text(row, name) for name in prompt_fields if name in _OPTIONAL}
    required = set(prompt_fields) - optional.keys()
    texts = {key: checked_text(text, key) for key, text in row.items() if isinstance(text, str) or key in required}
    for name in (required or given.keys) if given is not None else ():
        text_field(row, name)
    completion = texts.get(row_format.keys[-1], "") if row_format is not None and prompt_fields else ""
    return Row({**texts, **optional}, completion, turns, ignored_keys=tuple(key for key in row if key not in texts))


def _unknown_keys(row: Mapping[str, Any], row_format: Format, names: Iterable[str]) -> tuple[str, ...]:
    """The keys that ``row_format`` does not read; ``RowError`` for content and for misspelt ``names``."""
    unknown = tuple(key for key in row if key not in row_format.keys and key not in row_format.context)
    if row_format.name == "chat" and row_format.has_key_in(row):
        names = row_format.context  # one of its two keys is there, so the other is not missing
    for key in unknown:
        if key in _CONTENT and row_format.prompt_fields and not is_empty(row[key]):
            what = f"field {key!r} would be lost: {row_format.name} rows have no place for it; take it out if it may be"
            advice, meant = "", _PLACES.get(key)
            if meant in row_format.keys + row_format.context:
                advice = f", or read it as the field {meant!r}: --map {meant}={key}"
            elif key == "context" and row_format.name == "gsm8k":
                advice = ", or read it as an input: --map "
                advice += "squad" if "answers" in row else "instruction=question,input=context,output=answer"
            raise RowError("unread_field", what, advice)
        for name in names:
            # Of a key that may be absent only a near misspelling counts.
            if name not in row and within_edits(key.lower(), name, 1 if name in row_format.context else 2):
                what = f"unknown field {quote(key)}, did you mean {name!r}?"
                raise RowError("unknown_field", what, f" (--map {name}={key})")
    return unknown


def _read_alpaca(row: Mapping[str, Any]) -> Row:
    fields = {"instruction": text_field(row, "instruction"), "input": optional_text(row, "input")}
    system = optional_text(row, "system")
    if not is_empty(system):
        fields["system"] = system
    made = Row(fields, text_field(row, "output"))
    if is_empty(row.get("history")):
        return made
    adjusted, ignored = set[str](), set[str]()
    turns = read_history(row, adjusted, ignored)
    return replace(made, turns=turns, ignored_keys=tuple(sorted(ignored)), adjusted=tuple(sorted(adjusted)))


def _plain_format(name: str, *keys: str) -> Format:
    """A format whose rows have no optional keys; the last key is the completion's."""

    def read(row: Mapping[str, Any]) -> Row:
        return Row({key: text_field(row, key) for key in keys[:-1]}, text_field(row, keys[-1]))

    return Format(name, keys, keys[:-1], read, (), keys, keys)


FORMATS = {
    row_format.name: row_format
    for row_format in (
        Format(
            "alpaca",
            ("instruction", "input", "output"),
            ("instruction", "input", "system"),
            _read_alpaca,
            context=("system", "history"),
            distinctive_keys=("instruction",),
            required=("instruction", "output"),
        ),
        replace(_plain_format("gsm8k", "question", "answer"), distinctive_keys=("question",)),
        Format(
            "chat",
            (*_CHATS, EARLIER),
            ("user", "system"),
            read_chat,
            context=("system", "tools"),
            distinctive_keys=_CHATS,
            required=_CHATS,
        ),
        _plain_format("completion", "prompt", "completion"),
        _plain_format("text", "text"),
    )
}
"""The formats in the order in which ``detect_format`` tries them: an alpaca row may also have a ``text``."""

_OPTIONAL = ("input", "system")
_CONTENT = {
    "system", "system_prompt", "system_message", "history", "tools", "functions", "tool_calls", "function_call",
    "image", "images", "video", "videos", "audio", "audios", "context", "documents",
}  # fmt: skip
"""Keys under which data sets keep a part of the conversation, in any format but ``text``."""
_PLACES = {"system_prompt": "system", "system_message": "system", "context": "input"}
"""The fields as which some of them may be meant."""
_TREE = {"role", "parent_id"}
"""Keys of a message of a tree of messages (Open Assistant), which has a ``text``."""
ROWS_TRIED = 1000


def check_format(name: str) -> None:
    """Raise ``SpecError`` unless ``name`` is a format's or ``auto``."""
    known = ("auto", *FORMATS)
    if name not in known:
        raise SpecError(f"--format is {name!r}", None, f"known: {', '.join(known)}")


def detect_format(rows: Iterable[RawRow], path: object = None, columns: ColumnMap | None = None) -> Format | None:
    """The format of the first usable row, else of the first row with a distinctive key of a format, else None.

    ``DataError`` if that row satisfies two formats.
    """
    likely: Format | None = None
    for raw in itertools.islice(rows, ROWS_TRIED):
        with contextlib.suppress(RowError):
            row = decode_row(raw)
            candidate = _format_of(row, raw, path, columns)
            likely = likely or candidate
            if candidate is not None:
                row_of(row, candidate, columns)
                return candidate
    return likely


def _format_of(row: Mapping[str, Any], raw: RawRow, path: object, columns: ColumnMap | None) -> Format | None:
    if columns is not None:
        row, _ = columns.apply(row)
    keys, row = row.keys(), {key: value for key, value in row.items() if value is not None}
    satisfied = _satisfied(row)
    if len(satisfied) > 1:
        todo = f"choose with {' or '.join(f'--format {known.name}' for known in satisfied)}"
        raise DataError(_two(satisfied), raw.place(path), todo)
    if satisfied and not (satisfied[0].name == "text" and keys >= _TREE):
        return satisfied[0]
    if columns is None and not satisfied and (preset := preset_of(row)) is not None:
        return FORMATS[preset.format]
    return None if satisfied else next((known for known in FORMATS.values() if known.has_key_in(row)), None)


def _satisfied(row: Mapping[str, Any]) -> list[Format]:
    """The formats that a row satisfies, but not text if it has an instruction: published Alpaca rows have both."""
    satisfied = [known for known in FORMATS.values() if known.is_satisfied_by(row)]
    return [known for known in satisfied if known.name != "text" or "instruction" not in row]


def _two(satisfied: Sequence[Format]) -> str:
    return f"the row has the fields of {' and of '.join(f'{known.name} rows' for known in satisfied)}"


_ANNOTATION = re.compile(r"<<[^<>]*>>")


def strip_annotations(answer: str) -> str:
    """A GSM8K answer without its calculator annotations: ``48/2 = <<48/2=24>>24`` becomes ``48/2 = 24``."""
    return _ANNOTATION.sub("", answer)
