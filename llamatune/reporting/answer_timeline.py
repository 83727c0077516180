"""Timelines of answers: what a run answered to each prompt of ``evaluation.prompts``, evaluation by evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llamatune.data.templates import Template
from llamatune.errors import printable
from llamatune.events import Answer
from llamatune.reporting.report_text import KEPT
from llamatune.reporting.sample_answers import instruction_of

_MOST = 12
"""Answers of a prompt: the first, the last, and others at equal distances."""


@dataclass(frozen=True)
class AnswerTimeline:
    """One prompt and its ``answers``, (step, text) each in the order of steps; step 0 is before training.

    ``left_out``: how many answers between the first and the last are not among them. ``reference`` is the row's own.
    ``instruction`` is the prompt without its template, None if it is not of a known one.
    """

    prompt: str
    instruction: str | None
    reference: str | None
    answers: list[tuple[int, str]]
    left_out: int

    @property
    def note(self) -> str:
        """How many answers are shown; empty where all are."""
        every = len(self.answers) + self.left_out
        return f"{len(self.answers)} of {every} answers; metrics.jsonl has all." if self.left_out else ""

    def lines(self) -> list[tuple[str, str]]:
        """After what, and the answer: that of the prompt's row first, then the run's by step."""
        reference = [] if self.reference is None else [("reference", self.reference)]
        by_step = [("before training" if step == 0 else f"step {step:,}", text) for step, text in self.answers]
        return [(label, shown_answer(text)) for label, text in (*reference, *by_step)]


def shown_answer(text: str) -> str:
    """An answer without the spaces before it, which a base model's often begins with; an empty one is said to be so."""
    return text.lstrip(" ") or "(nothing)"


def answer_timelines(answers: Sequence[Answer], templates: Sequence[Template] = ()) -> list[AnswerTimeline]:
    """A timeline for each prompt, in their order; prompts that a later start of the run has instead come after.

    ``templates`` are those that a prompt may be of.
    """
    by_prompt: dict[tuple[int, str], list[Answer]] = {}
    for answer in answers:
        by_prompt.setdefault((answer.number, answer.prompt), []).append(answer)
    return [_timeline(found, templates) for found in by_prompt.values()]


def _timeline(found: Sequence[Answer], templates: Sequence[Template]) -> AnswerTimeline:
    count = min(_MOST, len(found))
    places = sorted({round(place * (len(found) - 1) / max(1, count - 1)) for place in range(count)})
    shown = [(found[place].step, _shown(found[place])) for place in places]
    reference, instruction = found[0].reference, instruction_of(found[0].prompt, templates)
    return AnswerTimeline(
        printable(found[0].prompt, KEPT),
        None if instruction is None else printable(instruction, KEPT),
        None if reference is None else printable(reference, KEPT),
        shown,
        len(found) - len(shown),
    )


def _shown(answer: Answer) -> str:
    """The answer, and whether the limit of tokens cut it."""
    return printable(answer.answer, KEPT) + (" ..." if answer.finish_reason == "length" else "")
