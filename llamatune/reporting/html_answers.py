"""Answers as HTML: of samples reference, base's and tuned one side by side; of a run's prompts one a line by step."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from llamatune.inference.prepared_prompts import HEADINGS
from llamatune.reporting.answer_timeline import AnswerTimeline, shown_answer
from llamatune.reporting.html_elements import Markup, breakable, element, header
from llamatune.reporting.report_text import ABSENT
from llamatune.reporting.sample_answers import Sample, Samples

_LONG_PROMPT, _LONG = 400, 2000
"""Characters of a prompt that is not bold and scrolls, and of a prompt with its answers that paper may divide."""


def answers_html(answers: Sequence[Samples]) -> Markup:
    """The answers of each source, those to rows under headings that say where the rows are from."""
    parts = list[Markup]()
    for source, found in itertools.groupby(answers, key=lambda each: each.source):
        samples = [sample for each in found for sample in each.samples]
        compared = any(sample.base is not None for sample in samples)
        apart = any(sample.split for sample in samples)
        parts += [element("h3", breakable(source))]
        for split, group in itertools.groupby(samples, key=lambda sample: sample.split):
            parts += [element("h4", HEADINGS[split] if split else "Prompts")] if apart else []
            parts += [_answer(number, sample, compared) for number, sample in enumerate(group, 1)]
    return Markup("".join(parts))


def _answer(number: int, sample: Sample, compared: bool) -> Markup:
    name = f"Prompt {number}" if sample.row is None else f"Row {sample.row}"
    texts = {"reference": sample.reference} if sample.reference is not None else {}
    texts |= {"base": ABSENT if sample.base is None else sample.base} if compared else {}
    texts["tuned" if compared else "completion"] = sample.tuned
    cells = (element("td", shown_answer(text), data_label=label, dir="auto") for label, text in texts.items())
    shown = element("table", header(list(texts)), element("tbody", element("tr", *cells)), class_="answers")
    asked = _asked(sample.instruction, sample.prompt)
    return _block(element("p", name, class_="quiet"), asked, shown, texts=(asked, *texts.values()))


def _block(*content: Markup, texts: Iterable[str]) -> Markup:
    """A prompt and its answers, which are kept on one sheet of paper unless they are long."""
    return element("div", *content, class_="answer long" if sum(map(len, texts)) > _LONG else "answer")


def _asked(instruction: str | None, prompt: str) -> Markup:
    """The instruction, and the whole prompt folded if it is more."""
    text = instruction or prompt
    kind = "instruction long" if len(text) > _LONG_PROMPT else "instruction"
    asked = element("p", text, class_=kind, dir="auto")
    if instruction is None or instruction == prompt:
        return asked
    folded = element(
        "details", element("summary", "As the model read it"), element("pre", prompt, class_="prompt", dir="auto")
    )
    return Markup(asked + folded)


def timeline_html(run: str, number: int, found: AnswerTimeline) -> Markup:
    """One prompt of ``evaluation.prompts``; the answer of its row, and the model's by step."""
    lines = found.lines()
    rows = [element("tr", element("th", label, scope="row"), element("td", text, dir="auto")) for label, text in lines]
    shown = element("table", header(("", "answer")), element("tbody", *rows), class_="timeline")
    told = element("p", found.note, class_="quiet") if found.note else Markup()
    name, asked = element("p", f"{run}: prompt {number}", class_="quiet"), _asked(found.instruction, found.prompt)
    return _block(name, asked, shown, told, texts=(asked, *(text for _, text in lines)))
