"""``state.json`` of a run's checkpoint, and the names of checkpoints. No torch.

It holds the position of the run, the loss scaler, the length of the log, and the versions and the machine that wrote
it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from llamatune.formats.file_schema import (
    LARGEST_FILE,
    LARGEST_NUMBER,
    Count,
    FileEntry,
    FileSchema,
    Measure,
    Name,
    Perplexity,
    Positive,
    parse_values,
    require,
)
from llamatune.formats.manifest import OtherVersion
from llamatune.strict_json import read_json, write_json

STATE, SCHEMA = "state.json", 3
_READ = (1, 2, SCHEMA)
"""1: by versions that compute each micro-batch by itself and cannot continue a later run. 2: by versions that kept all
epochs here, and not in ``metrics.jsonl``."""
GROWTH, BACKOFF = 2.0, 0.5
"""The factors of the loss scaler."""
_NAME = re.compile(r"step-(\d{6,15})")


class Gpu(FileSchema):
    """The GPU that computed; what NVML does not say is null."""

    name: Name
    capability: Name | None = None
    driver: Name | None = None
    cuda_driver: Name | None = None
    cuda: Name | None = None


class GpuUse(FileSchema):
    """What the GPUs of all ranks used so far."""

    energy_j: Measure | None = None
    metered_s: Measure
    peak_power_w: Measure | None = None
    peak_device_memory_bytes: Count | None = None


class Scaler(FileSchema):
    """The loss scaler of fp16, under the names of torch's GradScaler; empty in other precisions."""

    model_config = ConfigDict(populate_by_name=True)
    scale: Annotated[float, Field(gt=0, lt=LARGEST_NUMBER)] | None = None
    growth_factor: Annotated[float, Field(ge=GROWTH, le=GROWTH)] | None = None
    backoff_factor: Annotated[float, Field(ge=BACKOFF, le=BACKOFF)] | None = None
    growth_interval: Positive | None = None
    growth_tracker: Count | None = Field(None, alias="_growth_tracker")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        values = (self.scale, self.growth_factor, self.backoff_factor, self.growth_interval, self.growth_tracker)
        if any(value is None for value in values) and any(value is not None for value in values):
            raise ValueError("holds a part of the scaler's state")
        if self.growth_tracker is not None and self.growth_tracker >= (self.growth_interval or 0):
            raise ValueError("growth_tracker should be below growth_interval")
        return self


class OpenEpoch(FileSchema):
    """Sums over the epoch in which a checkpoint was saved."""

    began_s: Measure = 0.0
    loss: Measure = 0.0
    target_tokens: Count = 0
    tokens: Count = 0
    training_s: Measure = 0.0
    evaluation_s: Measure = 0.0
    checkpoint_s: Measure = 0.0
    validation_loss: Measure | None = None


class ClosedEpoch(FileSchema):
    """The means of a whole epoch; null is what an earlier version did not count."""

    epoch: Positive
    train_loss: Measure
    train_perplexity: Perplexity
    validation_loss: Measure | None = None
    validation_perplexity: Perplexity | None = None
    epoch_s: Measure | None = None
    evaluation_s: Measure | None = None
    checkpoint_s: Measure | None = None
    target_tokens: Positive | None = None
    tokens_per_second: Measure | None = None


class Position(FileSchema):
    """Where a run was, as ``training.trainer_state.TrainerState`` has it.

    ``epochs``: all closed ones, in schemas before 3.
    """

    step: Count
    window: Count
    saved_window: Count
    saved_step: Count
    evaluated_step: Count
    closed_epochs: Count
    open_epoch: OpenEpoch
    epochs: list[ClosedEpoch] = Field(default_factory=list)
    best_eval_loss: Measure | None
    best_step: Positive | None
    patience_loss: Measure | None
    evaluations_without_improvement: Count
    tokens: Count
    training_s: Measure
    elapsed_s: Measure
    skipped_windows: Count

    @model_validator(mode="before")
    @classmethod
    def _of_first_versions(cls, values: Any) -> Any:
        """They kept only the losses of epochs, and patience compared with the lowest loss."""
        if not isinstance(values, dict) or "epoch_loss" not in values:
            return values
        values = dict(values)
        open_epoch = {"began_s": values.get("elapsed_s"), "loss": values.pop("epoch_loss")}
        open_epoch["target_tokens"] = values.pop("epoch_target_tokens", None)
        return {**values, "open_epoch": open_epoch, "patience_loss": values.get("best_eval_loss")}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        best = self.best_step or 0
        require({
            "window should be step and skipped_windows together": self.window == self.step + self.skipped_windows,
            "saved_window should be window": self.saved_window == self.window,
            "saved_step should be step": self.saved_step == self.step,
            "evaluated_step should be step or less": self.evaluated_step <= self.step,
            "closed_epochs should be window or less": self.closed_epochs <= self.window,
            "best_step should be evaluated_step or less": best <= self.evaluated_step,
            "best_step and best_eval_loss should be there together": (best == 0) == (self.best_eval_loss is None),
            "evaluations_without_improvement should be evaluated_step or less": (
                self.evaluations_without_improvement <= self.evaluated_step
            ),
            "open_epoch.tokens should be tokens or less": self.open_epoch.tokens <= self.tokens,
            "epochs should be closed_epochs or fewer, in order": [found.epoch for found in self.epochs]
            == sorted({found.epoch for found in self.epochs if found.epoch <= self.closed_epochs}),
        })  # fmt: skip
        return self


class SavedState(FileSchema):
    """The whole file. ``metrics_bytes`` is the length of the log; what early versions did not record is null."""

    model_config = ConfigDict(populate_by_name=True)
    schema_version: Literal[1, 2, 3] = Field(3, alias="schema")
    step: Count
    position: Position
    scaler: Scaler
    metrics_bytes: Count
    llamatune: Name | None = None
    torch: Name | None = None
    threads: Positive | None = None
    cpu: Name | None = None
    gpu: Gpu | None = None
    kernels: Name | None = None
    gpu_use: GpuUse | None = None
    base_files: dict[Name, FileEntry] | None = None

    @property
    def recorded_base(self) -> dict[str, Any]:
        """Size and SHA-256 of the base's files by name, as in a manifest, as far as they were known."""
        return {name: digest.model_dump() for name, digest in (self.base_files or {}).items()}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.step != self.position.step:
            raise ValueError(f"step is {self.step} where the position has {self.position.step}")
        return self


def checkpoint_path(directory: Path, step: int) -> Path:
    """``checkpoints/step-000100`` inside a run directory."""
    return directory / f"step-{step:06d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Finished checkpoints of a run by step, the newest first."""
    if not directory.is_dir():
        return []
    steps = [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(steps, reverse=True)]


def write_progress(checkpoint: Path, progress: SavedState) -> None:
    """Write ``state.json`` into a checkpoint's staging directory."""
    values = progress.model_dump(by_alias=True, exclude_unset=True)
    write_json(checkpoint / STATE, {"schema": SCHEMA, **values})


def read_progress(checkpoint: Path) -> SavedState:
    """Read ``state.json`` of a checkpoint.

    Raises:
        OtherVersion: of another schema. CheckpointError: a value does not fit.
    """
    path = checkpoint / STATE
    values = read_json(path, max_bytes=LARGEST_FILE)
    if values.get("schema") not in _READ or type(values["schema"]) is not int:
        raise OtherVersion(values.get("schema"), checkpoint)
    return parse_values(SavedState, values, path)
