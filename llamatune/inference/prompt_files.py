"""Prompts as a user writes them: of the command line, standard input and files, and as text in a template."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from llamatune.data.column_maps import ColumnMap, parse_map
from llamatune.data.raw_row import RawRow, RowError
from llamatune.data.row_files import BEGINS_AS_JSON, file_kind, read_raw_rows, read_text, row_suffix
from llamatune.data.row_formats import FORMATS, Format, check_format, prompt_row_of
from llamatune.data.row_json import Row, decode_value, kind_of
from llamatune.data.row_sources import pipes_kept
from llamatune.data.templates import Template
from llamatune.errors import DataError, SpecError
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.inference.prepared_prompts import PreparedPrompt
from llamatune.strict_json import parse_json

_LARGEST_TEXT = 256 << 20
_LARGEST_PIPED_PROMPT = 16 << 20
_OF_JSON = (".json", ".jsonl", ".ndjson")
"""Endings of names that say that a file holds rows."""


@dataclass(frozen=True, slots=True)
class FilePrompt:
    """A prompt of a file.

    Args:
        asked: a user's message, or a row.
        row: its number in the file, from 1.
        where: its place, for errors.
        reference: the answer that the row has.
    """

    asked: str | Row
    row: int
    where: str
    reference: str | None = None

    def labelled(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        """A line of output for the answer: with the row's number, and its own answer if it has one."""
        reference = {} if self.reference is None else {"reference": self.reference}
        return {"row": self.row, **answer, **reference}


Prompt = str | Mapping[str, str] | Row | FilePrompt | PreparedPrompt
"""A user's message, a row (its fields by name), one of these from a file, or what was prepared."""


class PromptSource(Protocol):
    """Options that say what is asked."""

    @property
    def prompt(self) -> Sequence[str]: ...
    @property
    def prompt_file(self) -> Path | None: ...
    @property
    def format(self) -> str: ...
    @property
    def column_map(self) -> str | None: ...


def given_prompts(
    source: PromptSource, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> list[Prompt]:
    """What ``--prompt`` or ``--prompt-file`` hold; both together are refused, neither is no prompt."""
    if source.prompt_file is not None:
        if source.prompt:
            raise SpecError("--prompt and --prompt-file exclude each other")
        return read_prompts(source.prompt_file, source.format, source.column_map, on_event, should_stop)
    for flag, is_given in (("--format", source.format != "auto"), ("--map", source.column_map is not None)):
        if is_given:
            raise SpecError("it needs --prompt-file", flag)
    return list(source.prompt)


def piped_prompt(stdin: BinaryIO) -> str:
    """All of standard input, without its last line break."""
    content = stdin.read(_LARGEST_PIPED_PROMPT + 1)
    if len(content) > _LARGEST_PIPED_PROMPT:
        what = f"more than {_LARGEST_PIPED_PROMPT:,} bytes"
        raise DataError(what, "standard input", "pass prompts with --prompt-file")
    try:
        text = content.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as fault:
        raise DataError(f"not UTF-8 at byte {fault.start}", "standard input") from None
    if not text:
        raise SpecError("no prompt", "standard input", "pass --prompt TEXT, --prompt-file FILE, or pipe a prompt in")
    return text


def prompt_text(prompt: Prompt, template: Template | None, number: int) -> str:
    """The prompt as the model sees it; ``number`` counts prompts from 1, for errors."""
    where = f"prompt {number}"
    if isinstance(prompt, FilePrompt):
        where, prompt = prompt.where, prompt.asked
    assert not isinstance(prompt, PreparedPrompt), "it is encoded already"
    if isinstance(prompt, str):
        return prompt if template is None else template.instruction_prompt(prompt)
    row = prompt if isinstance(prompt, Row) else Row(dict(prompt), "")
    if template is None or not template.placeholders:
        text = row.fields.get("prompt", row.fields.get("text"))
        if text is None:
            what = "a row without the field 'prompt', and no template to make one"
            raise DataError(what, where, "name a template with --template")
        return text if template is None else template.instruction_prompt(text)
    optional = dict.fromkeys(template.placeholders & {"input", "system"}, "")
    for name in sorted(template.placeholders - optional.keys() - row.fields.keys()):
        what = "a field that is not text," if name in row.ignored_keys else "no field"
        texts = ", ".join(map(repr, row.fields)) or "none"
        raise DataError(f"{what} {name!r} for the template {template.name!r}", where, f"its text fields are {texts}")
    if misfit := template.misfit(row):
        raise DataError(misfit, where)
    return template.prompt_of({**optional, **row.fields}, row.turns)


def read_prompts(
    path: Path,
    format: str = "auto",
    column_map: str | None = None,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
) -> list[Prompt]:
    """Prompts from a file: rows as ``prepare-data`` reads them, or plain text, one prompt a line; blank lines skipped.

    Where neither its kind nor its name says that it holds rows, a file is text if none of its lines is JSON or if
    ``format`` is text. The completion of a row may be absent, and a row of JSON may be a text. ``column_map`` is that
    of ``prepare-data``.

    Raises:
        SpecError: no such format, or no such map.
        DataError: no prompts, not UTF-8, a row that cannot be used (with its place), or rows between plain lines.
        Stopped: ``should_stop`` said so while a pipe was read.
    """
    check_format(format)
    columns = None if column_map is None else parse_map(column_map)

    def note(message: str) -> None:
        on_event(Notice(f"{path}: {message}"))

    with pipes_kept([path], should_stop):
        is_named = file_kind(path) in ("table", "columnar") or row_suffix(path) in _OF_JSON or columns is not None
        content = None if is_named or format not in ("auto", "text") else read_text(path, _LARGEST_TEXT)
        if content is None or (format == "auto" and BEGINS_AS_JSON.match(content)):
            rows: Iterable[RawRow] | None = read_raw_rows(path, note)
        else:
            rows = None if format == "text" else _json_rows(content, path)
        if rows is not None:
            prompts = [
                _row_prompt(raw, number, path, FORMATS.get(format), columns) for number, raw in enumerate(rows, 1)
            ]
        else:
            lines = enumerate(_lines(content or b"", path), 1)
            prompts = [FilePrompt(text.rstrip("\r"), row, f"{path}:{line}") for row, (line, text) in lines]
    if not prompts:
        raise DataError("no prompts", path)
    return list(prompts)


def _lines(content: bytes, path: Path) -> list[tuple[int, str]]:
    """The lines of a text that are not blank, with their numbers."""
    if b"\0" in content:
        raise DataError(f"no text: a NUL byte at byte {content.index(0)}", path)
    try:
        text = content.decode()
    except UnicodeDecodeError as fault:
        raise DataError(f"not UTF-8 at byte {fault.start}", path) from None
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _json_rows(content: bytes, path: Path) -> list[RawRow] | None:
    """The rows of a file that does not begin as rows do, if it is a JSON list or each of its lines is JSON."""
    if content.lstrip().startswith(b"["):
        with contextlib.suppress(ValueError, RecursionError):
            values = parse_json(content)
            return [RawRow(1, 0, json.dumps(value).encode(), None, row, True) for row, value in enumerate(values, 1)]
    lines = _lines(content, path)
    rows = [RawRow(number, 0, line.encode(), None, row) for row, (number, line) in enumerate(lines, 1) if _is_row(line)]
    if rows and len(rows) < len(lines):
        todo = "let every line be a row, or none, or give --format text"
        raise DataError("a line of JSON in a file of plain text", f"{path}:{rows[0].line}", todo)
    return rows or None


def _is_row(line: str) -> bool:
    """Whether a line is an object, a list or a text of JSON; a number or a word may be a prompt."""
    with contextlib.suppress(RowError):
        return line.lstrip()[:1] in ("{", "[", '"') and decode_value(RawRow(1, 0, line.encode())) is not None
    return False


def _row_prompt(
    raw: RawRow, number: int, path: Path, row_format: Format | None, columns: ColumnMap | None
) -> FilePrompt:
    place = raw.place(path)
    try:
        value = decode_value(raw)
        if isinstance(value, str) and value.strip():
            return FilePrompt(value, number, place)
        if not isinstance(value, dict):
            what = "an empty text" if isinstance(value, str) else kind_of(value)
            raise RowError("not_an_object", f"{what} where a row or a prompt is expected")
        row = prompt_row_of(value, row_format, columns)
    except RowError as fault:
        todo = "correct it, or give plain prompts, one a line, with --format text in a file of another name"
        raise DataError(fault.message, place, todo) from None
    return FilePrompt(row, number, place, row.completion or None)
