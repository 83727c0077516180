"""Answers as HTML: of samples reference, base's and tuned one side by side; of a run's prompts one a line by step."""

from __future__ import annotations

import itertools

from llamatune.inference.prepared_prompts import HEADINGS
from llamatune.reporting.answer_timeline import AnswerTimeline, shown_answer
from llamatune.reporting.html_elements import Markup, element, header
from llamatune.reporting.report_text import ABSENT
from llamatune.reporting.sample_answers import Sample, Samples


def answers_html(answers: Samples) -> Markup:
    """The answers of one source, those to rows under headings that say where the rows are from."""
    compared = any(sample.base is not None for sample in answers.samples)
    parts = [element("h3", answers.source)]
    for split, group in itertools.groupby(answers.samples, key=lambda sample: sample.split):
        parts += [element("h4", HEADINGS[split])] if split is not None else []
        parts += [_answer(number, sample, compared) for number, sample in enumerate(group, 1)]
    return Markup("".join(parts))


def _answer(number: int, sample: Sample, compared: bool) -> Markup:
    name = f"Prompt {number}" if sample.row is None else f"Row {sample.row}"
    texts = {"reference": sample.reference} if sample.reference is not None else {}
    texts |= {"base": ABSENT if sample.base is None else sample.base} if compared else {}
    texts["tuned" if compared else "completion"] = sample.tuned
    cells = (element("td", shown_answer(text), data_label=label) for label, text in texts.items())
    shown = element("table", header(list(texts)), element("tbody", element("tr", *cells)), class_="answers")
    asked = _asked(sample.instruction, sample.prompt)
    return element("div", element("p", name, class_="quiet"), asked, shown, class_="answer")


def _asked(instruction: str | None, prompt: str) -> Markup:
    """The instruction, and the whole prompt folded if it is more."""
    asked = element("p", instruction or prompt, class_="instruction")
    if instruction is None or instruction == prompt:
        return asked
    folded = element("details", element("summary", "As the model read it"), element("pre", prompt))
    return Markup(asked + folded)


def timeline_html(run: str, number: int, found: AnswerTimeline) -> Markup:
    """One prompt of ``evaluation.prompts``; the answer of its row, and the model's by step."""
    rows = [element("tr", element("th", label, scope="row"), element("td", text)) for label, text in found.lines()]
    shown = element("table", header(("after", "answer")), element("tbody", *rows), class_="timeline")
    told = element("p", found.note, class_="quiet") if found.note else Markup()
    name = element("p", f"{run}: prompt {number}", class_="quiet")
    return element("div", name, _asked(found.instruction, found.prompt), shown, told, class_="answer")
