"""Row formats: which fields a row has, and what of it is prompt and what completion.

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

Rows are checked strictly, because a silently skipped or misread row costs a training run: fields must be non-empty
strings, and a key that looks like a misspelt field is an error. Other extra keys are ignored and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llamatune.data.chat import read_chat
from llamatune.data.decoding import Row, decode_row, kind_of, quote, text_field, without_nul
from llamatune.data.rows import RawRow, RowError


@dataclass(frozen=True)
class Format:
    """A row format. ``prompt_fields`` are the placeholders that its rows can fill; ``keys`` all the keys it reads."""

    name: str
    keys: tuple[str, ...]
    prompt_fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]


def parse_row(raw: RawRow, row_format: Format) -> Row:
    """The row that ``raw`` holds.

    Raises:
        RowError: not JSON, not of this format, or with characters that no tokenizer can take.
    """
    return row_of(decode_row(raw), row_format)


def row_of(row: Mapping[str, Any], row_format: Format) -> Row:
    """``row`` read as ``row_format``; see ``parse_row``."""
    unknown = [key for key in row if key not in row_format.keys]
    for key in unknown:
        for known in row_format.keys:
            if within_two_edits(key, known):
                raise RowError("unknown_field", f"unknown field {quote(key)}, did you mean {known!r}?")
    made = row_format.read(row)
    if unknown:
        return Row(made.fields, made.completion, made.turns, tuple(unknown))
    return made


def _read_alpaca(row: Mapping[str, Any]) -> Row:
    instruction = text_field(row, "instruction")
    context = row.get("input")
    if context is None:  # absent, or null as pandas writes it
        context = ""
    if not isinstance(context, str):
        raise RowError("wrong_type", f"field 'input' of the row is {kind_of(context)}, not a string")
    completion = text_field(row, "output")
    return Row({"instruction": instruction, "input": without_nul(context, "input")}, completion)


def _read_gsm8k(row: Mapping[str, Any]) -> Row:
    return Row({"question": text_field(row, "question")}, text_field(row, "answer"))


def _read_completion(row: Mapping[str, Any]) -> Row:
    return Row({"prompt": text_field(row, "prompt")}, text_field(row, "completion"))


def _read_text(row: Mapping[str, Any]) -> Row:
    return Row({}, text_field(row, "text"))


FORMATS: dict[str, Format] = {
    made.name: made
    for made in (
        Format("alpaca", ("instruction", "input", "output"), ("instruction", "input"), _read_alpaca),
        Format("gsm8k", ("question", "answer"), ("question",), _read_gsm8k),
        Format("chat", ("messages", "conversations"), ("user", "system"), read_chat),
        Format("completion", ("prompt", "completion"), ("prompt",), _read_completion),
        Format("text", ("text",), (), _read_text),
    )
}
"""The formats in the order in which ``detect_format`` tries them: an alpaca row may carry a ``text`` too."""

_TELLING = {"alpaca": ("instruction",), "gsm8k": ("question",), "chat": ("messages", "conversations")}
_ROWS_LOOKED_AT = 1000


def detect_format(rows: Iterable[RawRow]) -> Format | None:
    """The format of the first usable row, else of the first row that has at least a telling key, else None."""
    likely: Format | None = None
    for number, raw in enumerate(rows):
        if number == _ROWS_LOOKED_AT:
            break
        try:
            row = decode_row(raw)
        except RowError:
            continue
        for candidate in FORMATS.values():
            if not any(key in row for key in _TELLING.get(candidate.name, candidate.keys)):
                continue
            likely = likely or candidate
            try:
                row_of(row, candidate)
            except RowError:
                break
            return candidate
    return likely


_ANNOTATION = re.compile(r"<<[^<>]*>>")


def strip_annotations(answer: str) -> str:
    """A GSM8K answer without its calculator notes: ``48/2 = <<48/2=24>>24`` becomes ``48/2 = 24``."""
    return _ANNOTATION.sub("", answer)


def within_two_edits(left: str, right: str) -> bool:
    """Whether at most two insertions, deletions, substitutions or swaps of neighbours make ``left`` into ``right``."""
    if abs(len(left) - len(right)) > 2:
        return False
    before: list[int] = []
    previous = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        current = [i]
        for j, b in enumerate(right, start=1):
            cost = min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
        before, previous = previous, current
    return previous[-1] <= 2
