"""GSM8K evaluation: zero-shot or few-shot accuracy of a model, alone or beside its base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.data.templates import TEMPLATES, Template
from llamatune.errors import DataError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.formats.answer_log import AnswerLog, open_answer_log
from llamatune.inference.engine import complete
from llamatune.inference.evaluate import MEMORY_ADVICE
from llamatune.inference.gsm8k import Question, choose_examples, extract_answer, is_answered, prompt_of, read_questions
from llamatune.inference.model_source import OpenedModel, open_model
from llamatune.inference.significance import Accuracy, exact_mcnemar
from llamatune.options.inference import EvaluateOptions
from llamatune.out_of_memory import memory_faults
from llamatune.safe_reading import digest_file
from llamatune.threads import suitable_threads
from llamatune.tokenizers.base import Tokenizer

_REVISION = 1  # raise it when the same settings come to give other answers


@dataclass(frozen=True)
class Reply:
    """The answer of one model to one question."""

    completion: str
    finish_reason: str


Replies = dict[str, Reply]
"""The answers to one question, by the model's prefix: ``""`` and, where the base is compared, ``base_``."""


@dataclass(frozen=True)
class Gsm8kReport:
    """Every question with its replies."""

    data: str
    dtype: str
    shots: int
    answered: list[tuple[Question, Replies]]

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        values: dict[str, Any] = {
            "task": "gsm8k",
            "data": self.data,
            "shots": self.shots,
            "questions": len(self.answered),
            "dtype": self.dtype,
        }
        lines = [as_line(question, replies) for question, replies in self.answered]
        for prefix in self.answered[0][1]:
            accuracy = Accuracy.of(line[f"{prefix}correct"] for line in lines)
            values[f"{prefix}correct"] = accuracy.right
            values[f"{prefix}accuracy"] = accuracy.fraction
            values[f"{prefix}accuracy_interval"] = accuracy.interval
            values[f"{prefix}invalid"] = sum(line[f"{prefix}answer"] is None for line in lines)
            values[f"{prefix}unfinished"] = sum(line[f"{prefix}finish_reason"] == "length" for line in lines)
        if "base_correct" in values:
            values["accuracy_difference"] = values["accuracy"] - values["base_accuracy"]
            values["gained"] = sum(line["correct"] and not line["base_correct"] for line in lines)
            values["lost"] = sum(line["base_correct"] and not line["correct"] for line in lines)
            values["p_value"] = exact_mcnemar(values["gained"], values["lost"])
        return values


def as_line(question: Question, replies: Replies) -> dict[str, Any]:
    """A question and its scored replies, as a line of the output."""
    line: dict[str, Any] = {"row": question.row, "question": question.text, "expected": question.expected}
    for prefix, reply in replies.items():
        answer = extract_answer(reply.completion)
        line[f"{prefix}answer"] = answer
        line[f"{prefix}correct"] = answer == question.expected
        line[f"{prefix}finish_reason"] = reply.finish_reason
        line[f"{prefix}completion"] = reply.completion
    return line


def evaluate_gsm8k(
    options: EvaluateOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> Gsm8kReport:
    """Generate an answer to every question, and score it.

    Raises:
        DataError: rows that cannot be used.
        CheckpointError: a model that cannot be used.
        EnvironmentFault: the output is another evaluation's, or cannot be written.
        Stopped: ``should_stop`` said so; with an output the same evaluation goes on.
    """
    opened = open_model(options, on_event)
    tokenizer, template = opened.tokenizer(), opened.template(options.template)
    if template is None and options.template is None:
        template = TEMPLATES["gsm8k"]
    asked, examples = read_questions(options.data), []
    if options.shots_data is not None:
        examples = choose_examples(options.shots_data, options.shots or 0, options.sampling.seed, asked)
    questions = asked[: options.limit]
    texts = [prompt_of(question, template, examples) for question in questions]
    prompts = opened.encode(tokenizer, texts, options.sampling.max_new_tokens, on_event)
    report = Gsm8kReport(str(options.data), opened.dtype_name, options.shots or 0, [])
    answered = report.answered
    with contextlib.ExitStack() as stack:
        log = None
        if options.output is not None:
            settings = _settings(options, opened, tokenizer, template, examples)
            log = stack.enter_context(open_answer_log(options.output, settings, options.overwrite))
            answered += _kept(log, questions, ("", "base_") if options.compare else ("",))
            if answered:
                on_event(Notice(f"{options.output} holds {len(answered)} of {len(questions)} answers already"))
            if len(answered) == len(questions):
                return report
            # Whole batches only, so that the rows of a batch do not depend on where the evaluation was stopped.
            del answered[len(answered) // options.batch_size * options.batch_size :]
            log.keep(len(answered))
        stack.enter_context(memory_faults(opened.device, MEMORY_ADVICE))
        together = min(options.batch_size, len(prompts))
        stack.enter_context(suitable_threads(opened.checkpoint.config, together))
        try:
            for batch in _replies(options, opened, tokenizer, prompts[len(answered) :], on_event, should_stop):
                asked = questions[len(answered) : len(answered) + len(batch)]
                added = list(zip(asked, batch, strict=True))
                if log is not None:
                    log.append(as_line(*answer) for answer in added)
                answered += added
                on_event(Progress("answering", len(answered), len(questions)))
        except Stopped:
            what, todo = f"stopped after {len(answered)} of {len(questions)} questions", "run the same command again"
            raise Stopped(what, options.output, todo if log else None) from None
    return report


def _replies(
    options: EvaluateOptions,
    opened: OpenedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    on_event: OnEvent,
    should_stop: ShouldStop,
) -> Iterator[list[Replies]]:
    """The replies to each prompt, a batch at a time: greedy, and ended once no further text can change the score."""
    models = opened.load(on_event, should_stop)
    eos_ids = {*opened.checkpoint.config.eos_token_ids, tokenizer.eos_id}

    def is_enough(ids: Sequence[int]) -> bool:
        return is_answered(tokenizer.decode(ids), bool(options.shots))

    for first in range(0, len(prompts), options.batch_size):
        batch = prompts[first : first + options.batch_size]
        batch_replies: list[Replies] = [{} for _ in batch]
        for prefix, model in models.items():
            completions = complete(model, batch, options.sampling, eos_ids, should_stop, is_enough)
            for replies, prompt, completion in zip(batch_replies, batch, completions, strict=True):
                replies[prefix] = Reply(tokenizer.continuation(prompt, completion.ids), completion.finish_reason)
        yield batch_replies


def _settings(
    options: EvaluateOptions,
    opened: OpenedModel,
    tokenizer: Tokenizer,
    template: Template | None,
    examples: list[Question],
) -> dict[str, Any]:
    """Everything that decides an answer. The number of questions and the batch size may change between calls."""
    adapter = opened.adapter
    return {
        "task": "gsm8k",
        "revision": _REVISION,
        "model": fingerprint(opened.checkpoint),
        "adapter": None if adapter is None else {"sha256": adapter.digest, "scaling": adapter.config.scaling()},
        "compare": options.compare,
        "dtype": opened.dtype_name,
        "tokenizer": tokenizer.fingerprint,
        "data": digest_file(options.data, DataError),
        "template": None if template is None or examples else template.to_dict(),
        "shots": [asdict(example) for example in examples],
        "max_new_tokens": options.sampling.max_new_tokens,
    }


def _kept(log: AnswerLog, questions: list[Question], prefixes: Sequence[str]) -> Iterator[tuple[Question, Replies]]:
    """The answers already in the output, up to the first line that this evaluation would not have written."""
    for question, line in zip(questions, log.entries(), strict=False):
        try:
            replies = {p: Reply(line[f"{p}completion"], line[f"{p}finish_reason"]) for p in prefixes}
            if as_line(question, replies) != line:
                return
        except (KeyError, TypeError):
            return
        yield question, replies
