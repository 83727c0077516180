"""Prompts as a user writes them: of the command line, standard input and files, and as text in a template."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from llamatune.data.row_files import RawRow, RowError, read_raw_rows
from llamatune.data.row_formats import prompt_row_of
from llamatune.data.row_json import Row, decode_row, decode_value, kind_of
from llamatune.data.templates import Template
from llamatune.errors import DataError, SpecError
from llamatune.safe_reading import read_bytes
from llamatune.strict_json import parse_json

_LARGEST_PROMPT_FILE = 256 << 20
_LARGEST_PIPED_PROMPT = 16 << 20

_ROWS_BEGIN = re.compile(rb"""\s*(?:\{\s*["']|\[\s*(?:\{\s*["']|["']))""")
"""How a file of rows or a list of prompts begins; ``[INST] Hi`` and ``{name} is`` begin otherwise."""

Prompt = str | Mapping[str, str] | Row
"""A user's message, or a row: its fields by name, or one of a file."""


def given_prompts(texts: Sequence[str], file: Path | None) -> list[Prompt]:
    """What ``--prompt`` or ``--prompt-file`` hold; both together are refused, neither is no prompt."""
    if texts and file is not None:
        raise SpecError("--prompt and --prompt-file exclude each other")
    return list(texts) if file is None else read_prompts(file)


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
    if isinstance(prompt, str):
        return prompt if template is None else template.instruction_prompt(prompt)
    row, where = prompt if isinstance(prompt, Row) else Row(dict(prompt), ""), f"prompt {number}"
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


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a file: rows as ``prepare-data`` reads them, or plain text, one prompt a line; blank lines skipped.

    A file holds rows if its name ends in .json, .jsonl or .ndjson, or if it begins as JSON does. A list may hold texts.

    Raises:
        DataError: no prompts, not UTF-8, a row that cannot be used (with its place), or rows between plain lines.
    """
    content = read_bytes(path, DataError, _LARGEST_PROMPT_FILE)
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson") or _begins_as_rows(content):
        prompts = [_row_prompt(raw, path) for raw in read_raw_rows(path)]
    else:
        prompts = list(_plain_prompts(content, path))
    if not prompts:
        raise DataError("no prompts", path)
    return prompts


def _begins_as_rows(content: bytes) -> bool:
    content = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _ROWS_BEGIN.match(content) or (content.startswith(b"{") and _is_object(content.split(b"\n", 1)[0])):
        return True
    try:
        return content.startswith(b"[") and isinstance(parse_json(content), list)
    except ValueError:
        return False


def _is_object(line: bytes) -> bool:
    with contextlib.suppress(RowError):
        decode_row(RawRow(1, 0, line.strip()))
        return True
    return False


def _plain_prompts(content: bytes, path: Path) -> Iterator[str]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise DataError(f"not UTF-8 at byte {fault.start}", path) from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("{") and _is_object(line.encode()):
            what = "a JSON row in a file that begins as plain text"
            raise DataError(what, f"{path}:{number}", "let every line be a row, or none")
        if line.strip():
            yield line.rstrip("\r")


def _row_prompt(raw: RawRow, path: Path) -> Prompt:
    try:
        value = decode_value(raw)
        if isinstance(value, str) and value.strip():
            return value
        if not isinstance(value, dict):
            what = "an empty text" if isinstance(value, str) else kind_of(value)
            raise RowError("not_an_object", f"{what} where a row or a prompt is expected")
        return prompt_row_of(value)
    except RowError as fault:
        todo = "correct it, or give plain prompts one a line in a .txt file that does not begin as JSON does"
        raise DataError(fault.message, raw.place(path), todo) from None
