"""GSM8K (Cobbe et al. 2021): zero-shot or few-shot accuracy of a model, alone or beside its base.

``gsm8k_answers`` has the rule of scoring.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llamatune.command_options.inference import EvaluateOptions
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.raw_row import RowError
from llamatune.data.row_files import read_raw_rows
from llamatune.data.row_formats import FORMATS, row_of
from llamatune.data.row_json import decode_row
from llamatune.data.row_sources import source_digest
from llamatune.data.segments import Segments
from llamatune.data.templates import TEMPLATES, Template
from llamatune.errors import DataError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.formats.answer_log import ENTRIES_AT_ONCE, AnswerLog, open_answer_log
from llamatune.inference.answer_settings import model_settings
from llamatune.inference.evaluate import smaller_batches
from llamatune.inference.gsm8k_answers import AnswerEnds, extract_answer
from llamatune.inference.model_completions import completions_by_model
from llamatune.inference.model_source import OpenedModel, open_model
from llamatune.inference.prompt_encoding import PromptEncoder, shown_answer
from llamatune.inference.significance import exact_mcnemar, score_interval
from llamatune.ranks import ALONE, Ranks
from llamatune.seeds import derived_seed
from llamatune.shapes.generation_sizes import ROWS_AT_ONCE
from llamatune.shared_work import refuse_differences, share_generating
from llamatune.tokenizers.tokenizer import Tokenizer

_REVISION = 1  # raise it when the same settings come to give other answers
_FEW_SHOT = TEMPLATES["gsm8k"]


@dataclass(frozen=True)
class Question:
    """A row: its number in the file from 1, the reference answer in full, and its final number."""

    row: int
    text: str
    worked: str
    expected: str


def read_questions(path: Path, on_event: OnEvent = ignore_event) -> list[Question]:
    """The rows of a GSM8K file; a notice names what is beside them.

    Raises:
        DataError: no rows; a row (``path:line``) without question or answer, or an answer without ``#### number``.
    """
    questions = []

    def note(message: str) -> None:
        on_event(Notice(f"{path}: {message}"))

    for number, raw in enumerate(read_raw_rows(path, note), start=1):
        try:
            row = row_of(decode_row(raw), FORMATS["gsm8k"])
        except RowError as fault:
            raise DataError(fault.what, raw.place(path), "GSM8K rows have 'question' and 'answer'") from None
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


def few_shot_prompt(question: Question, examples: Sequence[Question]) -> str:
    """The question after examples, in the same form as them."""
    shown = [f"{_FEW_SHOT.instruction_prompt(example.text)} {example.worked}\n\n" for example in examples]
    return "".join(shown) + _FEW_SHOT.instruction_prompt(question.text)


def gsm8k_report(data: str, dtype: str, shots: int, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``--json`` prints, from the lines of all questions as ``scored_line`` makes them."""
    values: dict[str, Any] = {"task": "gsm8k", "data": data, "shots": shots, "questions": len(lines), "dtype": dtype}
    compared = "base_correct" in lines[0]
    for prefix in ("", "base_") if compared else ("",):
        right = sum(line[f"{prefix}correct"] for line in lines)
        values[f"{prefix}correct"] = right
        values[f"{prefix}accuracy"] = right / len(lines)
        values[f"{prefix}accuracy_interval"] = score_interval(right, len(lines))
        values[f"{prefix}invalid"] = sum(line[f"{prefix}answer"] is None for line in lines)
        values[f"{prefix}unfinished"] = sum(line[f"{prefix}finish_reason"] == "length" for line in lines)
    if compared:
        values["accuracy_difference"] = values["accuracy"] - values["base_accuracy"]
        values["gained"] = sum(line["correct"] and not line["base_correct"] for line in lines)
        values["lost"] = sum(line["base_correct"] and not line["correct"] for line in lines)
        values["p_value"] = exact_mcnemar(values["gained"], values["lost"])
    return values


def scored_line(question: Question, replies: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """A question with its scored replies, as a line of the output.

    ``replies`` are (completion, finish reason) by the model's prefix: ``""`` and, where it is compared, ``base_``.
    """
    line: dict[str, Any] = {"row": question.row, "question": question.text, "expected": question.expected}
    for prefix, (completion, finish_reason) in replies.items():
        answer = extract_answer(completion)
        line[f"{prefix}answer"] = answer
        line[f"{prefix}correct"] = answer == question.expected
        line[f"{prefix}finish_reason"] = finish_reason
        line[f"{prefix}completion"] = completion
    return line


def evaluate_gsm8k(
    options: EvaluateOptions,
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Generate an answer to every question, and score it. Several ranks share the batches, and the first writes.

    Raises:
        DataError: rows that cannot be used.
        CheckpointError: a model that cannot be used.
        EnvironmentFault: the output is another evaluation's, or cannot be written.
        Stopped: ``should_stop`` said so; with an output the same evaluation goes on.
    """
    opened = open_model(options, on_event, ranks)
    tokenizer = opened.tokenizer()
    template = opened.template(options.template, tokenizer, on_event)
    if template is None and options.template is None:
        template = TEMPLATES["gsm8k"]
    asked, examples = read_questions(options.data, on_event), []
    if options.shots_data is not None:
        examples = choose_examples(options.shots_data, options.shots or 0, options.sampling.seed, asked)
    questions = asked[: options.limit]
    encoder = PromptEncoder(tokenizer, None if examples else template)
    shown = [
        encoder.segments(few_shot_prompt(question, examples) if examples else question.text, number)
        for number, question in enumerate(questions, 1)
    ]
    prompts = opened.encode(tokenizer, shown, options.sampling.max_new_tokens, on_event)
    lines: list[dict[str, Any]] = []
    report = partial(gsm8k_report, str(options.data), opened.dtype_name, options.shots or 0)
    settings: dict[str, Any] = {}
    if options.output is not None or ranks.size > 1:
        settings = _settings(options, opened, tokenizer, template, examples)
        refuse_differences(settings, ranks)
    with contextlib.ExitStack() as stack:
        log = None
        if options.output is not None and ranks.is_first:
            log = stack.enter_context(open_answer_log(options.output, settings, options.overwrite))
            lines += _kept_lines(log, questions, options.compare)
            if lines:
                on_event(Notice(f"{options.output} holds {len(lines)} of {len(questions)} answers already"))
        lines = ranks.from_first(lines)
        if len(lines) == len(questions):
            return report(lines)
        if log is not None:
            log.keep(len(lines))
        at_once = options.batch_size or ROWS_AT_ONCE[opened.device.type]
        advice = opened.memory_advice(*smaller_batches(at_once))
        stack.enter_context(opened.computing(min(at_once, len(prompts)), advice, on_event))
        eos_ids = encoder.stop_ids(opened.checkpoint.config)
        unanswered, kept = (questions[len(lines) :], shown[len(lines) :], prompts[len(lines) :]), len(lines)
        try:
            for line in _answer(options, opened, tokenizer, eos_ids, *unanswered, on_event, should_stop):
                lines.append(line)
                if log is not None and len(lines) - kept == min(at_once, ENTRIES_AT_ONCE):
                    log.append(lines[kept:])
                    kept = len(lines)
                on_event(Progress("answering", len(lines), len(questions)))
        except Stopped:
            what, todo = f"stopped after {len(lines)} of {len(questions)} questions", "run the same command again"
            raise Stopped(what, options.output, todo if options.output else None) from None
        finally:
            if log is not None:
                log.append(lines[kept:])
    return report(lines)


def _answer(
    options: EvaluateOptions,
    opened: OpenedModel,
    tokenizer: Tokenizer,
    eos_ids: set[int],
    questions: list[Question],
    shown: list[Segments],
    prompts: list[list[int]],
    on_event: OnEvent,
    should_stop: ShouldStop,
) -> Iterator[dict[str, Any]]:
    """The line of each question, in order: greedy, and ended once no further text can change the score."""
    loaded = opened.load(on_event, should_stop, generates=True)
    is_enough = AnswerEnds(tokenizer, bool(options.shots)).is_enough

    def answered(places: Sequence[int], should_stop: ShouldStop) -> Iterator[dict[str, Any]]:
        asked = [prompts[place] for place in places]
        replies = completions_by_model(
            loaded, asked, options.sampling, eos_ids, options.batch_size, should_stop, is_enough, on_event=on_event
        )
        for place, of_models in zip(places, replies, strict=True):
            texts = [
                (shown_answer(tokenizer, shown[place], prompts[place], reply.ids), reply.finish_reason)
                for reply in of_models
            ]
            yield scored_line(questions[place], dict(zip(loaded.by_prefix, texts, strict=True)))

    at_once = opened.ranks.from_first(options.batch_size or ROWS_AT_ONCE[opened.device.type])
    places, in_slices = range(len(prompts)), options.placement == "shard"
    yield from share_generating(places, answered, at_once, should_stop, opened.ranks, in_slices)


def _settings(
    options: EvaluateOptions,
    opened: OpenedModel,
    tokenizer: Tokenizer,
    template: Template | ChatTemplate | None,
    examples: list[Question],
) -> dict[str, Any]:
    """Everything that decides an answer. The number of questions and the batch size may change between calls."""
    return {
        "task": "gsm8k",
        "revision": _REVISION,
        **model_settings(options, opened, tokenizer),
        "data": source_digest(options.data),
        "template": None if template is None or examples else template.to_dict(),
        "shots": [asdict(example) for example in examples],
        "max_new_tokens": options.sampling.max_new_tokens,
    }


def _kept_lines(log: AnswerLog, questions: list[Question], compare: bool) -> Iterator[dict[str, Any]]:
    """The lines already in the output, up to the first that this evaluation would not have written."""
    prefixes = ("", "base_") if compare else ("",)
    for place, line in enumerate(itertools.islice(log.entries(), len(questions))):  # there may be fewer, or more
        try:
            replies = {p: (line[f"{p}completion"], line[f"{p}finish_reason"]) for p in prefixes}
            if scored_line(questions[place], replies) != line:
                return
        except (KeyError, TypeError):
            return
        yield line
