"""GSM8K (Cobbe et al. 2021): questions, prompts and scoring. Reference answers end in ``#### 18``.

The rule of scoring is the data set's own (``grade_school_math/dataset.py`` of its repository): the first match of
``ANSWER`` without its commas, compared as text. So ``18.0`` is not ``18``, and an answer without the mark is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamatune.data.row_decoding import decode_row
from llamatune.data.row_formats import FORMATS, row_of
from llamatune.data.row_reader import RowError, read_raw_rows
from llamatune.data.templates import TEMPLATES, Template
from llamatune.errors import DataError
from llamatune.seeds import derived_seed

ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
_FEW_SHOT = TEMPLATES["gsm8k"]
_NEXT_QUESTION = "Question:"


def extract_answer(text: str) -> str | None:
    """The final number of an answer, as text without commas; None: none is marked."""
    match = ANSWER.search(text)
    return None if match is None else match.group(1).replace(",", "")


def is_answered(text: str, few_shot: bool) -> bool:
    """Whether no more text can change the score: the marked number or, few-shot, the whole answer has ended."""
    match = ANSWER.search(text)
    return (match is not None and match.end() < len(text)) or (few_shot and _NEXT_QUESTION in text)


@dataclass(frozen=True)
class Question:
    """A row: its number in the file from 1, the reference answer in full, and its final number."""

    row: int
    text: str
    worked: str
    expected: str


def read_questions(path: Path) -> list[Question]:
    """The rows of a GSM8K file.

    Raises:
        DataError: no rows; a row (``path:line``) without question or answer, or an answer without ``#### number``.
    """
    questions = []
    for number, raw in enumerate(read_raw_rows(path), start=1):
        try:
            row = row_of(decode_row(raw), FORMATS["gsm8k"])
        except RowError as fault:
            raise DataError(fault.message, raw.place(path)) from None
        expected = extract_answer(row.completion)
        if expected is None:
            raise DataError("the answer has no '#### number' to compare with", raw.place(path))
        questions.append(Question(number, row.fields["question"], row.completion, expected))
    if not questions:
        raise DataError("no rows", path, "give GSM8K rows, of question and answer")
    return questions


def choose_examples(path: Path, shots: int, seed: int, asked: Sequence[Question]) -> list[Question]:
    """``shots`` worked examples from a GSM8K file, none of them in ``asked``; a function of ``seed``.

    Raises:
        DataError: as ``read_questions``, or too few rows.
    """
    texts = {question.text for question in asked}
    others = [row for row in read_questions(path) if row.text not in texts]
    if len(others) < shots:
        raise DataError(f"{len(others)} rows that are not asked themselves, fewer than {shots} shots", path)
    return sorted(others, key=lambda row: derived_seed(seed, "shots", row.row))[:shots]


def prompt_of(question: Question, template: Template | None, examples: Sequence[Question]) -> str:
    """The question in its template; after examples, in the same form as them."""
    if not examples:
        return question.text if template is None else template.instruction_prompt(question.text)
    shown = [f"{_FEW_SHOT.instruction_prompt(example.text)} {example.worked}\n\n" for example in examples]
    return "".join(shown) + _FEW_SHOT.instruction_prompt(question.text)
