"""How many GSM8K questions a model answers right: zero-shot or few-shot, alone or beside its base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.data.prompts import TEMPLATES, Template
from llamatune.data.tokenizer import Tokenizer
from llamatune.errors import DataError, SpecError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.files import digest_file
from llamatune.inference.evaluate import MEMORY_ADVICE, Evaluation
from llamatune.inference.generate import complete
from llamatune.inference.gsm8k import Question, choose_examples, extract_answer, is_answered, prompt_of, read_questions
from llamatune.inference.opened import OpenedModel
from llamatune.inference.sampling import Sampling
from llamatune.inference.significance import Accuracy, exact_mcnemar
from llamatune.journal import Journal, open_journal
from llamatune.out_of_memory import memory_faults
from llamatune.threads import suitable_threads

_REVISION = 1  # raise it when the same settings come to give other answers


@dataclass(frozen=True, kw_only=True)
class Gsm8kEvaluation(Evaluation):
    """``data`` is a GSM8K file. Generation is greedy.

    Args:
        template: of zero-shot prompts; None: the one stored with the adapter or merged model, else ``gsm8k``.
        shots: worked examples before each question, the same before all: a function of ``seed`` and the two files.
        shots_data: the GSM8K file that they come from; what ``data`` asks is never shown.
        output: where each answer is kept, so that a stopped evaluation goes on.
    """

    template: str | None = None
    shots: int = 0
    shots_data: Path | None = None
    seed: int = 0
    max_new_tokens: int = 512
    output: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.sampling  # which checks its own bounds
        if not 0 <= self.shots <= 100:
            raise SpecError(f"--shots is {self.shots}, it must be 0 to 100")
        if (self.shots > 0) != (self.shots_data is not None):
            raise SpecError("--shots and --shots-data belong together", None, "give both, or neither")
        if self.shots and self.template is not None:
            raise SpecError(
                "--template and --shots exclude each other", None, "few-shot prompts have a form of their own"
            )

    @property
    def sampling(self) -> Sampling:
        """Greedy."""
        return Sampling(self.max_new_tokens, temperature=0, seed=self.seed)


@dataclass(frozen=True)
class Reply:
    """What one model said to one question."""

    completion: str
    finish_reason: str


Replies = dict[str, Reply]
"""What was said to one question, by the model's prefix: ``""`` and, where it is compared, ``base_``."""


@dataclass(frozen=True)
class Gsm8kReport:
    """Every question with the replies to it."""

    data: str
    dtype: str
    shots: int
    answered: list[tuple[Question, Replies]]

    def to_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        found: dict[str, Any] = {
            "task": "gsm8k",
            "data": self.data,
            "shots": self.shots,
            "questions": len(self.answered),
            "dtype": self.dtype,
        }
        lines = [as_line(question, replies) for question, replies in self.answered]
        for prefix in self.answered[0][1]:
            accuracy = Accuracy.of(line[f"{prefix}correct"] for line in lines)
            found[f"{prefix}correct"] = accuracy.right
            found[f"{prefix}accuracy"] = accuracy.fraction
            found[f"{prefix}accuracy_interval"] = accuracy.interval
            found[f"{prefix}invalid"] = sum(line[f"{prefix}answer"] is None for line in lines)
            found[f"{prefix}unfinished"] = sum(line[f"{prefix}finish_reason"] == "length" for line in lines)
        if "base_correct" in found:
            found["accuracy_difference"] = found["accuracy"] - found["base_accuracy"]
            found["gained"] = sum(line["correct"] and not line["base_correct"] for line in lines)
            found["lost"] = sum(line["base_correct"] and not line["correct"] for line in lines)
            found["p_value"] = exact_mcnemar(found["gained"], found["lost"])
        return found


def as_line(question: Question, replies: Replies) -> dict[str, Any]:
    """What the output says of one question."""
    line: dict[str, Any] = {"row": question.row, "question": question.text, "expected": question.expected}
    for prefix, reply in replies.items():
        answer = extract_answer(reply.completion)
        line[f"{prefix}answer"] = answer
        line[f"{prefix}correct"] = answer == question.expected
        line[f"{prefix}finish_reason"] = reply.finish_reason
        line[f"{prefix}completion"] = reply.completion
    return line


def evaluate_gsm8k(
    evaluation: Gsm8kEvaluation, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> Gsm8kReport:
    """Let the model answer every question, and score the answers.

    Raises:
        SpecError: options that do not fit each other. DataError: rows that cannot be used.
        CheckpointError: a model that cannot be used.
        EnvironmentFault: the output is another evaluation's, or cannot be written.
        Stopped: ``should_stop`` said so; with an output the same evaluation goes on.
    """
    opened = evaluation.open_model(on_event)
    tokenizer, template = opened.tokenizer(), opened.template(evaluation.template)
    if template is None and evaluation.template is None:
        template = TEMPLATES["gsm8k"]
    asked, examples = read_questions(evaluation.data), []
    if evaluation.shots_data is not None:
        examples = choose_examples(evaluation.shots_data, evaluation.shots, evaluation.seed, asked)
    questions = asked[: evaluation.limit]
    texts = [prompt_of(question, template, examples) for question in questions]
    prompts = opened.encode(tokenizer, texts, evaluation.max_new_tokens, on_event)
    report = Gsm8kReport(str(evaluation.data), opened.dtype_name, evaluation.shots, [])
    answered = report.answered
    with contextlib.ExitStack() as stack:
        journal = None
        if evaluation.output is not None:
            settings = _settings(evaluation, opened, tokenizer, template, examples)
            journal = stack.enter_context(open_journal(evaluation.output, settings, evaluation.overwrite))
            answered += _kept(journal, questions, ("", "base_") if evaluation.compare else ("",))
            if answered:
                on_event(Notice(f"{evaluation.output} holds {len(answered)} of {len(questions)} answers already"))
            if len(answered) == len(questions):
                return report
            # A batch is answered whole, so that who stands beside whom does not depend on where it was stopped.
            del answered[len(answered) // evaluation.batch_size * evaluation.batch_size :]
            journal.keep(len(answered))
        stack.enter_context(memory_faults(opened.device, MEMORY_ADVICE))
        together = min(evaluation.batch_size, len(prompts))
        stack.enter_context(suitable_threads(opened.checkpoint.config, together))
        try:
            for batch in _replies(evaluation, opened, tokenizer, prompts[len(answered) :], on_event, should_stop):
                added = list(zip(questions[len(answered) :], batch, strict=False))
                if journal is not None:
                    journal.append(as_line(*answer) for answer in added)
                answered += added
                on_event(Progress("answering", len(answered), len(questions)))
        except Stopped:
            what, todo = f"stopped after {len(answered)} of {len(questions)} questions", "run the same command again"
            raise Stopped(what, evaluation.output, todo if journal else None) from None
    return report


def _replies(
    evaluation: Gsm8kEvaluation,
    opened: OpenedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    on_event: OnEvent,
    should_stop: ShouldStop,
) -> Iterator[list[Replies]]:
    """What is said to each prompt, a batch at a time, greedily and no longer than it can change the score."""
    models = opened.load(on_event, should_stop)
    eos_ids = {*opened.checkpoint.config.eos_token_ids, tokenizer.eos_id}

    def is_enough(ids: Sequence[int]) -> bool:
        return is_answered(tokenizer.decode(ids), evaluation.shots > 0)

    for first in range(0, len(prompts), evaluation.batch_size):
        batch = prompts[first : first + evaluation.batch_size]
        said: list[Replies] = [{} for _ in batch]
        for prefix, model in models.items():
            completions = complete(model, batch, evaluation.sampling, eos_ids, should_stop, is_enough)
            for replies, prompt, found in zip(said, batch, completions, strict=True):
                replies[prefix] = Reply(tokenizer.continuation(prompt, found.ids), found.finish_reason)
        yield said


def _settings(
    evaluation: Gsm8kEvaluation,
    opened: OpenedModel,
    tokenizer: Tokenizer,
    template: Template | None,
    examples: list[Question],
) -> dict[str, Any]:
    """All that decides an answer. Not the number of questions or the batch, so that either may change on the way."""
    adapter = opened.adapter
    return {
        "task": "gsm8k",
        "revision": _REVISION,
        "model": fingerprint(opened.checkpoint),
        "adapter": None if adapter is None else {"sha256": adapter.digest, "scaling": adapter.config.scaling()},
        "compare": evaluation.compare,
        "dtype": opened.dtype_name,
        "tokenizer": tokenizer.fingerprint,
        "data": digest_file(evaluation.data, DataError),
        "template": None if template is None or examples else template.to_dict(),
        "shots": [asdict(example) for example in examples],
        "max_new_tokens": evaluation.max_new_tokens,
    }


def _kept(journal: Journal, questions: list[Question], prefixes: Sequence[str]) -> Iterator[tuple[Question, Replies]]:
    """What the output holds already, up to the first line that this evaluation would not have written."""
    for question, line in zip(questions, journal.entries(), strict=False):
        try:
            replies = {p: Reply(line[f"{p}completion"], line[f"{p}finish_reason"]) for p in prefixes}
            if as_line(question, replies) != line:
                return
        except (KeyError, TypeError):
            return
        yield question, replies
