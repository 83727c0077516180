"""Sample answers as HTML: each instruction, and below it reference, base's answer and tuned one, side by side."""

from __future__ import annotations

import itertools

from llamatune.inference.prepared_prompts import HEADINGS
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
    cells = (element("td", text, data_label=label) for label, text in texts.items())
    shown = element("table", header(list(texts)), element("tbody", element("tr", *cells)), class_="answers")
    instruction = element("p", sample.instruction or sample.prompt, class_="instruction")
    folded = Markup()
    if sample.instruction is not None and sample.instruction != sample.prompt:
        folded = element("details", element("summary", "As the model read it"), element("pre", sample.prompt))
    return element("div", element("p", name, class_="quiet"), instruction, folded, shown, class_="answer")
