"""What ``evaluate --json`` prints, as it is kept in a file: its schemas and its reader. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from llamatune.errors import DataError
from llamatune.formats.file_schema import Count, FileSchema, Measure, Name, Perplexity, Positive, parse_values
from llamatune.strict_json import read_json

_LARGEST_FILE = 1 << 20
_GIVE_ANOTHER = "give what llamatune evaluate --json printed"
_Share = Annotated[float, Field(ge=0, le=1)]
_Interval = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Printed(FileSchema):
    """Keys that later versions add are passed over."""

    model_config = ConfigDict(extra="ignore")

    data: Name
    dtype: Name


class PreparedEvaluation(_Printed):
    """Loss on prepared rows; ``base_`` figures where two models were compared."""

    split: Name
    rows: Positive
    target_tokens: Positive
    loss: Measure
    perplexity: Perplexity
    token_accuracy: _Share
    base_loss: Measure | None = None
    base_perplexity: Perplexity | None = None
    base_token_accuracy: _Share | None = None
    loss_difference: float | None = None
    loss_difference_interval: _Interval | None = None
    improved_rows: Count | None = None


class Gsm8kEvaluation(_Printed):
    """Answers to GSM8K questions."""

    task: Literal["gsm8k"]
    shots: Count
    questions: Positive
    correct: Count
    accuracy: _Share
    accuracy_interval: _Interval
    invalid: Count
    unfinished: Count
    base_correct: Count | None = None
    base_accuracy: _Share | None = None
    base_accuracy_interval: _Interval | None = None
    base_invalid: Count | None = None
    base_unfinished: Count | None = None
    gained: Count | None = None
    lost: Count | None = None
    p_value: _Share | None = None


def read_evaluation(path: Path) -> dict[str, Any]:
    """The known figures in a file, without those that it has not.

    Raises:
        DataError: not strict JSON, or a key or value that does not fit, which is named.
    """
    values = read_json(path, DataError, _LARGEST_FILE)
    schema: type[_Printed] = Gsm8kEvaluation if "task" in values else PreparedEvaluation
    return parse_values(schema, values, path, DataError, _GIVE_ANOTHER).model_dump(exclude_none=True)
