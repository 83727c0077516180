"""Schemas of JSON files that llamatune writes: strict types, finite numbers, bounded counts, known keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from llamatune.errors import CheckpointError, LlamatuneError
from llamatune.schema_words import plain_words
from llamatune.strict_json import read_json

LARGEST_FILE = 16 << 20
"""Bytes of one file; far above what is written, and what it takes in memory is still small."""
LARGEST_WHOLE = 1 << 53
"""Below it every whole number is exact as a float."""
LARGEST_NUMBER = 1e100
"""Far above any real figure, so that products and axis limits stay finite."""
EDITED = "was it edited? restore it from a copy, or start again in another directory"
_LONGEST_VALUE = 80


def _plain(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("it should be a value of JSON, with finite numbers") from None
    return value


Count = Annotated[int, Field(ge=0, lt=LARGEST_WHOLE)]
Positive = Annotated[int, Field(ge=1, lt=LARGEST_WHOLE)]
Measure = Annotated[float, Field(ge=0, lt=LARGEST_NUMBER)]
"""A loss, a norm, seconds, a rate: none is negative."""
Rate = Annotated[float, Field(gt=0)]
"""A learning rate; a spec has any that is above 0."""
Perplexity = Annotated[float, Field(ge=0)]
"""The exponential of a loss, which may be near the largest float."""
Name = Annotated[str, Field(max_length=4096)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
JsonValue = Annotated[Any, AfterValidator(_plain)]


class FileSchema(BaseModel):
    """What a JSON object of a file holds. A key that is not known, or a value of another type, is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class FileEntry(FileSchema):
    """Size in bytes and SHA-256 of a file."""

    bytes: Count
    sha256: Sha256


def require(rules: Mapping[str, bool]) -> None:
    """Raise ``ValueError`` with the first rule that does not hold."""
    broken = next((rule for rule, holds in rules.items() if not holds), None)
    if broken is not None:
        raise ValueError(broken)


Schema = TypeVar("Schema", bound=FileSchema)


def parse_values(
    schema: type[Schema],
    values: object,
    where: object,
    error: type[LlamatuneError] = CheckpointError,
    todo: str = EDITED,
) -> Schema:
    """``values`` as the schema has them; an error names ``where``, the first key that does not fit, and ``todo``."""
    try:
        return schema.model_validate(values)
    except ValidationError as fault:
        raise error(describe(fault), where, todo) from None


def read_schema(schema: type[Schema], path: Path, max_bytes: int = LARGEST_FILE) -> Schema:
    """A file of one JSON object.

    Raises:
        CheckpointError: not strict JSON, or a key or value that does not fit, which is named.
    """
    return parse_values(schema, read_json(path, max_bytes=max_bytes), path)


def describe(fault: ValidationError) -> str:
    """The first key that does not fit and why, and how many more there are."""
    errors = fault.errors(include_url=False)
    error = errors[0]
    key = ".".join(map(str, error["loc"]))[:200]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if error["type"] == "missing":
        return f"has no {key}{more}"
    if error["type"] == "extra_forbidden":
        return f"has the unknown key {key}{more}"
    if error["type"] == "value_error":
        why = str(error["ctx"]["error"])
        return f"{key}: {why}{more}" if key else f"{why}{more}"
    why = plain_words(error)
    it = "it " if why.startswith("should") else ""
    return f"{key or 'the whole'} is {_shown(error['input'])}: {it}{why}{more}"


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} ..."
