"""``summary.json``, the results of a finished run: its schema, its reader and its writer. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from llamatune.durable_writing import write_atomic
from llamatune.formats.file_schema import (
    Count,
    FileSchema,
    Measure,
    Name,
    Positive,
    Rate,
    parse_values,
    read_schema,
    require,
)
from llamatune.formats.state_json import ClosedEpoch, Gpu
from llamatune.strict_json import dump_json


class Cpu(FileSchema):
    """The processor of the machine; ``cores`` are those that the process could use, ``threads`` torch's."""

    name: Name
    cores: Positive
    threads: Positive


class Stop(FileSchema):
    """How patience ended the run."""

    step: Positive
    loss: Measure | None = None
    evaluations_without_improvement: Positive
    best_step: Positive
    best_eval_loss: Measure
    message: Name


class RankUse(FileSchema):
    """What one of several ranks measured."""

    peak_memory_bytes: Count
    tokens_per_second: Measure
    wait_share: Measure


class Summary(FileSchema):
    """The whole file. ``epochs`` are the last ones; what early versions did not record is null."""

    steps: Positive
    train_loss: Measure | None
    best_eval_loss: Measure | None
    best_step: Positive | None = None
    start_eval_loss: Measure | None = None
    trainable_parameters: Count
    total_parameters: Positive
    trainable_percent: Annotated[float, Field(ge=0, le=100)] | None = None
    peak_memory_bytes: Count
    peak_reserved_bytes: Count | None = None
    device: Name | None = None
    gpu: Gpu | None = None
    cpu: Cpu | None = None
    peak_device_memory_bytes: Count | None = None
    energy_j: Measure | None = None
    mean_power_w: Measure | None = None
    peak_power_w: Measure | None = None
    runtime_s: Measure
    tokens_per_second: Measure
    epochs: list[ClosedEpoch] = Field(default_factory=list)
    skipped_windows: Count = 0
    stopped_early: bool = False
    early_stop: Stop | None = None
    output_dir: Name | None = None
    ranks: list[RankUse] | None = None
    learning_rate: Rate | None = None
    placement: Name | None = None
    predicted_peak_memory_bytes: Count | None = None
    predicted_memory_bytes: dict[Name, Count] | None = None
    recomputed_layers: dict[Name, Count] | None = None
    memory_limit_bytes: Count | None = None
    memory_before_model_bytes: Count | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        numbers = [found.epoch for found in self.epochs]
        require({
            "best_step should be steps or less": (self.best_step or 0) <= self.steps,
            "trainable_parameters should be total_parameters or less": (
                self.trainable_parameters <= self.total_parameters
            ),
            "epochs should be in order": numbers == sorted(set(numbers)),
            "early_stop should be of a run that stopped_early": self.early_stop is None or self.stopped_early,
        })  # fmt: skip
        return self


def read_summary(path: Path) -> dict[str, Any]:
    """The values of a file, with null for what an early version did not record; ``ranks`` only where there were some.

    Raises:
        CheckpointError: a value does not fit.
    """
    values = read_schema(Summary, path).model_dump()
    return values if values["ranks"] is not None else {key: value for key, value in values.items() if key != "ranks"}


def write_summary(path: Path, values: Mapping[str, Any]) -> None:
    """Write the file, whole or not at all."""
    write_atomic(path, dump_json(parse_values(Summary, values, path).model_dump(exclude_unset=True)))
