"""Multiple-choice rows in the shapes of MMLU, HellaSwag and ARC, and the texts that lm-evaluation-harness asks with.

=========  ==================================================================  ============================
shape      a row                                                               a choice, after a space
=========  ==================================================================  ============================
mmlu       ``question``, ``choices`` (4), ``answer`` (0 to 3, or A to D),      its letter
           ``subject`` (may be absent: then no line names it)
hellaswag  ``activity_label``, ``ctx_a``, ``ctx_b``, ``endings``, ``label``    the ending
arc        ``question``, ``choices`` of ``text`` and ``label``, ``answerKey``  its text
           (or AI2's own: ``question`` of ``stem`` and ``choices``)
=========  ==================================================================  ============================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamatune.data.raw_row import RowError
from llamatune.data.row_files import read_raw_rows
from llamatune.data.row_json import checked_text, decode_row, field_of, kind_of, quote, text_field
from llamatune.errors import DataError
from llamatune.events import Notice, OnEvent, ignore_event

_LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class ChoiceQuestion:
    """A row: its number in the file from 1, the prompt, the choices as they are compared, the place of the right one.

    ``choices`` have no delimiter before them: ``acc_norm`` divides by their length.
    """

    row: int
    prompt: str
    choices: tuple[str, ...]
    right: int

    @property
    def text(self) -> str:
        """Of prompt and choices, to find it in other rows."""
        return "\n".join((self.prompt, *self.choices))


@dataclass(frozen=True)
class ChoiceFile:
    """The questions of a file, and which of the shapes they have."""

    path: Path
    shape: str
    questions: tuple[ChoiceQuestion, ...]


def read_choices(path: Path, on_event: OnEvent = ignore_event) -> ChoiceFile:
    """The questions of a file; its first row says which shape all have.

    Raises:
        DataError: no rows; a row of no shape, of another one than the first, or without a right answer.
    """
    questions, shape = list[ChoiceQuestion](), ""

    def note(message: str) -> None:
        on_event(Notice(f"{path}: {message}"))

    for number, raw in enumerate(read_raw_rows(path, note), start=1):
        try:
            row = decode_row(raw)
            shape = shape or _shape_of(row)
            prompt, choices, right = _SHAPES[shape](row)
        except RowError as fault:
            todo = f"the first row is of the shape {shape}" if questions else "give rows of MMLU, HellaSwag or ARC"
            raise DataError(fault.what, raw.place(path), todo) from None
        questions.append(ChoiceQuestion(number, prompt, choices, right))
    if not questions:
        raise DataError("no rows", path, "give rows of MMLU, HellaSwag or ARC")
    return ChoiceFile(path, shape, tuple(questions))


def _shape_of(row: Mapping[str, Any]) -> str:
    if "endings" in row:
        return "hellaswag"
    if "answerKey" in row:
        return "arc"
    if "question" in row and "choices" in row:
        return "mmlu"
    keys = ", ".join(quote(key) for key in row) or "none"
    raise RowError("missing_field", f"a row of no known shape; it has the fields {keys}")


_Asked = tuple[str, tuple[str, ...], int]


def _mmlu(row: Mapping[str, Any]) -> _Asked:
    choices = _texts(field_of(row, "choices"), "choices")
    if len(choices) != len(_LETTERS):
        raise RowError("wrong_type", f"{len(choices)} choices, and MMLU has {len(_LETTERS)}")
    lines = [text_field(row, "question").strip(), *(f"{a}. {b}" for a, b in zip(_LETTERS, choices, strict=True))]
    subject = "" if row.get("subject") is None else checked_text(row["subject"], "subject")
    about = " ".join(subject.split("_"))
    told = f"The following are multiple choice questions (with answers) about {about}.\n\n" if about else ""
    answer = row.get("answer")
    right = _LETTERS.index(answer) if answer in _LETTERS else _place(answer, "answer", len(_LETTERS))
    return told + "\n".join([*lines, "Answer:"]), _LETTERS, right


def _hellaswag(row: Mapping[str, Any]) -> _Asked:
    first, second = (checked_text(field_of(row, name), name) for name in ("ctx_a", "ctx_b"))
    endings = _texts(field_of(row, "endings"), "endings")
    prompt = f"{text_field(row, 'activity_label')}: {first} {second.capitalize()}"
    cleaned = tuple(map(_without_artifacts, endings))  # of "[step]" nothing is left, which the harness accepts
    return _without_artifacts(prompt), cleaned, _place(row.get("label"), "label", len(endings))


def _arc(row: Mapping[str, Any]) -> _Asked:
    question: Any = field_of(row, "question")
    choices: Any = row.get("choices")
    if isinstance(question, dict):  # as AI2 published it
        question, choices = question.get("stem"), question.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {name: [choice.get(name) for choice in choices] for name in ("text", "label")}
    if not isinstance(choices, dict):
        raise RowError("wrong_type", f"field 'choices' of the row is {kind_of(choices)}, not texts with labels")
    texts, labels = (_texts(choices.get(name), name) for name in ("text", "label"))
    key = checked_text(field_of(row, "answerKey"), "answerKey")
    if len(texts) != len(labels) or labels.count(key) != 1:
        raise RowError("wrong_type", f"answerKey is {quote(key)}, and the labels are {quote(', '.join(labels))}")
    return f"Question: {checked_text(question, 'question')}\nAnswer:", texts, labels.index(key)


_SHAPES: dict[str, Callable[[Mapping[str, Any]], _Asked]] = {"mmlu": _mmlu, "hellaswag": _hellaswag, "arc": _arc}


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise RowError("wrong_type", f"field {name!r} of the row is not a list of two texts or more")
    texts = tuple(checked_text(text, name) for text in value)
    if not all(texts):
        raise RowError("empty_field", f"a text in field {name!r} of the row is empty")
    return texts


def _place(value: Any, name: str, count: int) -> int:
    """Of the right choice: a number, or its text as Hugging Face's copy of HellaSwag has it."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 4:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise RowError("wrong_type", f"field {name!r} of the row is {quote(str(value))}, not one of 0 to {count - 1}")
    return value


def _without_artifacts(text: str) -> str:
    """HellaSwag's text without the marks that WikiHow left in it, in the harness's order of steps."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
