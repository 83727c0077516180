"""What is computed of each model of a run: losses of rows, choices, GSM8K answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from llamatune.command_options.inference import Sampling
from llamatune.command_options.judge import JudgeOptions
from llamatune.data.batches import Batch, Split
from llamatune.data.choice_rows import ChoiceFile
from llamatune.data.segments import Segments
from llamatune.data.templates import TEMPLATES
from llamatune.errors import NumericsError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop
from llamatune.inference.choice_scores import ChoiceScore, EncodedChoices, choice_batches, encode_choices, score_choices
from llamatune.inference.evaluate import RowScore, score_batch
from llamatune.inference.gsm8k import Question, scored_line
from llamatune.inference.gsm8k_answers import AnswerEnds
from llamatune.inference.model_completions import completions_by_model
from llamatune.inference.model_source import LoadedModels, OpenedModel
from llamatune.inference.prompt_encoding import PromptEncoder, shown_answer
from llamatune.judging.general_texts import Texts
from llamatune.model.loss import IGNORED
from llamatune.tokenizers.tokenizer import Tokenizer

BOTH = ("base_", "")
"""The prefixes of base and tuned model."""


class Measure(Protocol):
    """What is computed of models when they are loaded, and kept by their prefix."""

    def compute(self, loaded: LoadedModels, on_event: OnEvent, should_stop: ShouldStop) -> None:
        """Raises ``Stopped`` on request, and ``NumericsError`` for a value that is not finite."""


@dataclass
class RowLosses:
    """The loss of each row of ``name``, in batches that are made anew for each model."""

    name: str
    rows: int
    batches: Callable[[], Iterator[Batch]]
    scores: dict[str, list[RowScore]] = field(default_factory=dict)

    @classmethod
    def of_split(cls, name: str, split: Split, batch_size: int, limit: int | None) -> RowLosses:
        """Of prepared rows."""
        return cls(name, min(len(split), limit or len(split)), lambda: split.batches(batch_size, limit))

    @classmethod
    def of_texts(cls, texts: Texts, batch_size: int) -> RowLosses:
        """Of windows of text, every token of which but the first is a target."""

        def batches() -> Iterator[Batch]:
            for start in range(0, len(texts.windows), batch_size):
                windows = texts.windows[start : start + batch_size]
                ids = torch.tensor([[token for window in windows for token in window.ids]])
                labels = torch.full_like(ids, IGNORED)
                begin = 0
                for window in windows:
                    for first, last in window.targets:
                        labels[0, begin + first : begin + last] = ids[0, begin + first : begin + last]
                    begin += len(window.ids)
                lengths = tuple(len(window.ids) for window in windows)
                numbers = tuple(range(start + 1, start + 1 + len(windows)))
                yield Batch(ids, labels, lengths, numbers, int((labels != IGNORED).sum()))

        return cls(texts.name, len(texts.windows), batches)

    def compute(self, loaded: LoadedModels, on_event: OnEvent, should_stop: ShouldStop) -> None:
        found: dict[str, list[RowScore]] = {prefix: [] for prefix in loaded.by_prefix}
        for batch in self.batches():
            for prefix, model in loaded.by_prefix.items():
                _stop_if(should_stop)
                found[prefix] += score_batch(model, batch)
            for scores in found.values():
                _refuse_infinite(scores[-1].summed_loss, f"{self.name}, row {scores[-1].row}")
            on_event(Progress(f"loss of {self.name}", min(map(len, found.values())), self.rows))
        for scores in found.values():
            for score in scores:
                _refuse_infinite(score.summed_loss, f"{self.name}, row {score.row}")
        self.scores |= found


@dataclass
class Choices:
    """The questions of a file, and each model's scores."""

    name: str
    file: ChoiceFile
    encoded: list[EncodedChoices]
    batch_size: int
    scores: dict[str, list[ChoiceScore]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, name: str, file: ChoiceFile, tokenizer: Tokenizer, most: int, options: JudgeOptions, on_event: OnEvent
    ) -> Choices:
        """``most``: the tokens that the model knows; a notice counts the prompts that are longer."""
        asked = file.questions[: options.limit]
        encoded = [encode_choices(question, tokenizer, most, f"{file.path}: row {question.row}") for question in asked]
        if cut := sum(question.is_cut for question in encoded):
            what = f"{cut} of {len(encoded)} prompts lose their beginning: the model knows {most} tokens"
            on_event(Notice(f"{file.path}: {what}", "warning"))
        return cls(name, file, encoded, options.loss_rows)

    def compute(self, loaded: LoadedModels, on_event: OnEvent, should_stop: ShouldStop) -> None:
        found: dict[str, list[ChoiceScore]] = {prefix: [] for prefix in loaded.by_prefix}
        for batch in choice_batches(self.encoded, self.batch_size):
            for prefix, model in loaded.by_prefix.items():
                _stop_if(should_stop)
                found[prefix] += score_choices(model, batch)
                for score in found[prefix][-len(batch) :]:
                    _refuse_infinite(sum(score.loglikelihoods), f"{self.file.path}: row {score.row}")
            on_event(Progress(f"choices of {self.name}", min(map(len, found.values())), len(self.encoded)))
        self.scores |= found

    def lines(self) -> Iterator[dict[str, Any]]:
        """What ``--per-question`` writes, a line each."""
        for number, encoded in enumerate(self.encoded):
            line: dict[str, Any] = {"name": self.name, "row": encoded.question.row, "right": encoded.question.right}
            for prefix in BOTH:
                score = self.scores[prefix][number]
                line |= {f"{prefix}{key}": getattr(score, key) for key in ("loglikelihoods", "acc", "acc_norm")}
            yield line


@dataclass
class Answers:
    """GSM8K questions, zero-shot in the template of the tuned model, and each model's greedy answers."""

    questions: list[Question]
    shown: list[Segments]
    prompts: list[list[int]]
    tokenizer: Tokenizer
    stop_ids: set[int]
    options: JudgeOptions
    replies: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        questions: list[Question],
        tuned: OpenedModel,
        tokenizer: Tokenizer,
        options: JudgeOptions,
        on_event: OnEvent,
    ) -> Answers:
        """Without a template of its own the tuned model is asked in GSM8K's, as ``evaluate`` asks."""
        template = tuned.template(None, tokenizer, on_event) or TEMPLATES["gsm8k"]
        encoder = PromptEncoder(tokenizer, template)
        shown = [encoder.segments(question.text, question.row) for question in questions]
        prompts = tuned.encode(tokenizer, shown, options.max_new_tokens, on_event)
        return cls(questions, shown, prompts, tokenizer, encoder.stop_ids(tuned.config), options)

    def compute(self, loaded: LoadedModels, on_event: OnEvent, should_stop: ShouldStop) -> None:
        sampling = Sampling(self.options.max_new_tokens, temperature=0)
        is_enough = AnswerEnds(self.tokenizer, False).is_enough
        made = completions_by_model(
            loaded, self.prompts, sampling, self.stop_ids, self.options.batch_size, should_stop, is_enough,
            on_event=on_event,
        )  # fmt: skip
        for number, of_models in enumerate(made):
            for prefix, reply in zip(loaded.by_prefix, of_models, strict=True):
                text = shown_answer(self.tokenizer, self.shown[number], self.prompts[number], reply.ids)
                self.replies.setdefault(prefix, []).append((text, reply.finish_reason))
            on_event(Progress("answering", number + 1, len(self.prompts)))

    def lines(self) -> list[dict[str, Any]]:
        """As ``evaluate --task gsm8k --compare`` writes them."""
        return [
            scored_line(question, {prefix: self.replies[prefix][number] for prefix in ("", "base_")})
            for number, question in enumerate(self.questions)
        ]


def compute_all(
    opened: Mapping[str, OpenedModel],
    measures: Sequence[Measure],
    tokens: float,
    advice: str,
    on_event: OnEvent,
    should_stop: ShouldStop,
) -> None:
    """Compute all measures of base and tuned model, loaded together or one after the other."""
    for prefix, each in opened.items():
        with each.computing(tokens, each.memory_advice(advice) if advice else each.memory_advice(), on_event):
            loaded = each.load(on_event, should_stop)
            if not each.compare:
                loaded = LoadedModels({prefix: loaded.by_prefix[""]}, loaded.idle)
            for measure in measures:
                measure.compute(loaded, on_event, should_stop)
            del loaded  # before the next one is loaded


def _stop_if(should_stop: ShouldStop) -> None:
    if should_stop():
        raise Stopped("stopped while judging")


def _refuse_infinite(value: float, where: str) -> None:
    if not math.isfinite(value):
        raise NumericsError("a loss is not finite", where, "try --dtype float32")
