"""The lines of ``metrics.jsonl``: a schema for each kind, and the strict reader of one line."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from llamatune.formats.file_schema import Count, FileSchema, Measure, Name, Perplexity, Positive, describe
from llamatune.formats.rate_search import FoundRate
from llamatune.formats.state_json import ClosedEpoch
from llamatune.strict_json import parse_json


class StepLine(FileSchema):
    """An update of the weights."""

    event: Literal["step"]
    step: Positive
    window: Positive
    epoch: Measure
    loss: Measure
    learning_rate: Measure
    grad_norm: Measure
    loss_scale: Measure
    target_tokens: Positive
    tokens_per_second: Measure
    peak_memory_bytes: Count
    elapsed_s: Measure


class EvalLine(FileSchema):
    """An evaluation on the validation rows; the first versions kept its loss and perplexity alone."""

    event: Literal["eval"]
    step: Count
    loss: Measure
    perplexity: Perplexity = 0.0
    best: bool = False
    epoch: Measure = 0.0
    rows: Count = 0
    target_tokens: Count = 0
    seconds: Measure = 0.0


class SkippedLine(FileSchema):
    """An overflow of fp16."""

    event: Literal["skipped"]
    window: Positive
    loss_scale: Measure


class EpochLine(ClosedEpoch):
    """A whole epoch; versions before schema 3 of ``state.json`` wrote none."""

    event: Literal["epoch"]


class GradNormsLine(FileSchema):
    """The norms of the layers' gradients."""

    event: Literal["layer_grad_norms"]
    step: Positive
    norms: Annotated[dict[Name, Measure], Field(min_length=1)]


class AnswerLine(FileSchema):
    """An answer to one of the prompts of a run."""

    event: Literal["answer"]
    step: Count
    number: Positive
    prompt: str
    answer: str
    reference: str | None
    tokens: Count
    finish_reason: Literal["eos", "length"]


class EarlyStopLine(FileSchema):
    """The end of a run by patience."""

    event: Literal["early_stop"]
    step: Positive
    loss: Measure | None
    evaluations_without_improvement: Positive
    best_step: Positive
    best_eval_loss: Measure


class RateSearchLine(FoundRate):
    """The search for the learning rate, before the first step."""

    event: Literal["learning_rate_search"]


LINES: dict[Any, type[FileSchema]] = {
    "step": StepLine,
    "eval": EvalLine,
    "skipped": SkippedLine,
    "epoch": EpochLine,
    "layer_grad_norms": GradNormsLine,
    "answer": AnswerLine,
    "early_stop": EarlyStopLine,
    "learning_rate_search": RateSearchLine,
}
"""By ``event``."""


def parse_line(line: bytes) -> dict[str, Any]:
    """The object of a line; ``ValueError`` if it is not one whole line of strict JSON."""
    values = parse_json(line)
    if not line.endswith(b"\n") or not isinstance(values, dict):
        raise ValueError("not a line with one object")
    return values


def check_line(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` as parsed; ``ValueError`` if a key or value is none that a line of this kind has.

    A figure that is written as a whole number becomes a float, which no reader finds too large.
    """
    kind = values.get("event")
    if not isinstance(kind, str):
        raise ValueError("has no event")
    schema = LINES.get(kind)
    if schema is not None:
        try:
            parsed = schema.model_validate(values)
        except ValidationError as fault:
            raise ValueError(describe(fault)) from None
        return {name: getattr(parsed, name) for name in values}
    return values
