"""Outcome of a benchmark cell, kept as ``cells/NAME.json``: its schemas and its reader. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from llamatune.errors import CheckpointError
from llamatune.formats.file_schema import (
    LARGEST_NUMBER,
    LARGEST_WHOLE,
    Count,
    FileSchema,
    Measure,
    Name,
    Positive,
    parse_values,
)
from llamatune.strict_json import read_json

_Loss = Annotated[list[Measure], Field(min_length=1)]
_Rate = Annotated[float, Field(gt=0, lt=LARGEST_NUMBER)]
_Values = dict[Name, Name]
_REMOVE = "remove it, and the cell is measured again"


class Categories(FileSchema):
    """Bytes of each memory category at the peak."""

    parameters: Count
    gradients: Count
    optimizer: Count
    activations: Count
    casts: Count
    temporary: Count


class MeasuredCell(FileSchema):
    """A cell with numbers. Memory is in bytes, times in seconds."""

    values: _Values
    status: Literal["measured"]
    allocated_bytes: Positive
    predicted_bytes: Count | None
    reserved_bytes: Count | None
    device_bytes: Count | None
    resident_bytes: Count | None
    categories: Categories
    unattributed_bytes: Annotated[int, Field(gt=-LARGEST_WHOLE, lt=LARGEST_WHOLE)]
    losses: _Loss
    held_out_losses: list[Measure]
    step_s: _Rate
    step_s_range: Annotated[list[Measure], Field(min_length=2, max_length=2)]
    runtime_s: Measure
    tokens_per_second: _Rate
    steps: Positive
    warm_up_steps: Count
    skipped_windows: Count
    tokens: Count
    trainable_parameters: Count
    total_parameters: Positive
    device: Name
    device_name: Name
    threads: Positive
    torch: Name


class GenerationBatch(FileSchema):
    """Seconds of a batch."""

    prefill: Measure
    decode: Measure
    first_token: Measure


class MeasuredGeneration(FileSchema):
    """A cell of generation with numbers. Memory is in bytes, times in seconds."""

    values: _Values
    status: Literal["measured"]
    prefill_tokens_per_second: Measure
    prefill_deviation: Measure
    decode_tokens_per_second: Measure
    decode_deviation: Measure
    first_token_s: Measure
    first_token_deviation_s: Measure
    allocated_bytes: Count
    reserved_bytes: Count | None
    resident_bytes: Count | None
    weights_bytes: Count
    cache_bytes: Count
    step_read_bytes: Count
    bandwidth_bytes_per_second: Measure
    bandwidth_fraction: Measure
    seconds: Annotated[list[GenerationBatch], Field(min_length=1)]
    held_in: Name
    device: Name
    device_name: Name
    threads: Positive
    torch: Name


class UnmeasuredCell(FileSchema):
    """A cell without numbers, and why."""

    values: _Values
    status: Literal["oom", "refused", "failed", "killed"]
    reason: str
    exit_code: Annotated[int, Field(ge=-255, le=255)] | None = None


def read_cell(path: Path, seeds: int | None) -> dict[str, Any]:
    """The outcome in a file, without the cell's ``values``. ``seeds``: how many runs of training have losses, if any.

    Raises:
        CheckpointError: not strict JSON, or a key or value that does not fit, which is named.
    """
    raw = read_json(path, CheckpointError)
    schema: type[FileSchema] = UnmeasuredCell
    if raw.get("status") == "measured":
        schema = MeasuredGeneration if seeds is None else MeasuredCell
    # As parsed, since a whole number of JSON may be too large for those who draw it.
    parsed = parse_values(schema, raw, path, todo=_REMOVE).model_dump()
    cell = {name: parsed[name] for name in raw if name != "values"}  # in the file's order, as a measured one is
    for name, counts in (("losses", (seeds,)), ("held_out_losses", (0, seeds))):
        if schema is MeasuredCell and len(cell[name]) not in counts:
            raise CheckpointError(f"{name} has {len(cell[name])} numbers for {seeds} seeds", path, _REMOVE)
    return cell
