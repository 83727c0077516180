"""The run spec: sections, keys, defaults and bounds; reading it from YAML with overrides. No torch.

A field owns its name, default, bounds and description; docs/run-spec.md is made from it. Errors are reported together.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from llamatune.errors import SpecError
from llamatune.shapes.adapter import AdapterSpec
from llamatune.spec_overrides import override, refuse_twice, rename_aliases
from llamatune.spec_types import (
    CheckpointingMode,
    Fraction,
    FromList,
    MemorySize,
    NonEmptyText,
    PathText,
    Positive,
    TargetModules,
)
from llamatune.strict_yaml import read_yaml


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(_Section):
    """Which base model, and how its weights are held."""

    path: PathText = Field(description="a directory in Meta's or Hugging Face's format")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random reads only the configuration and draws the weights from training.seed"
    )
    dtype: Literal["float32", "bfloat16", "float16", "nf4"] = Field(
        "bfloat16", description="how frozen weights are held; nf4 (QLoRA) needs a lora section"
    )
    quantized_cache: PathText | None = Field(
        None, description="nf4: a directory that keeps the quantised weights of each base, made at the first run"
    )
    placement: Literal["auto", "device", "host", "shard"] = Field(
        "auto",
        description="where frozen blocks lie: on the device, in host memory, or in slices on all ranks; auto: "
        "device if a step fits there, else host on one GPU, shard with several processes",
    )
    num_layers: Positive | None = Field(None, description="keep only the first N layers, for debugging")
    memory_map: bool = Field(
        True,
        description="on a CPU: frozen weights are memory-mapped; false reads them into memory, for file systems on "
        "which a file may change or vanish during the run",
    )


class LoraSection(_Section):
    """The trained low-rank update."""

    r: Annotated[int, Field(ge=1, le=4096)] = Field(16, description="rank")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="the update is scaled by alpha / r")
    dropout: Fraction = Field(0.05, description="on the input of A")
    target_modules: TargetModules = Field(
        ("q_proj", "v_proj"), description="any of the seven linear layers, or all-linear"
    )
    init_from: PathText | None = Field(None, description="an adapter directory to start from")


class DataSection(_Section):
    """Which prepared rows."""

    train: PathText = Field(description="a directory written by prepare-data")
    validation: PathText | None = Field(None, description="another one; by default the split inside train")
    packing: bool = Field(
        False, description="several samples in one row, attention within each sample; micro_batch_size counts rows"
    )
    packed_tokens: Positive = Field(2048, description="the most tokens in a packed row; a longer sample is a row alone")
    shuffle: bool = Field(True, description="a permutation of (seed, epoch); false keeps the file's order")


class TrainingSection(_Section):
    """How the weights are trained."""

    output_dir: PathText = Field(description="the run directory")
    num_epochs: Positive | None = Field(None, description="passes over the rows; 5 if max_steps is not given either")
    max_steps: Positive | None = Field(None, description="optimizer updates, in place of num_epochs")
    micro_batch_size: Positive = Field(1, description="rows in one forward pass")
    gradient_accumulation_steps: Positive = Field(8, description="micro-batches per update")
    tokens_per_pass: Positive | Literal["auto"] | None = Field(
        "auto",
        description="micro-batches are computed together up to so many tokens; null: each alone; auto: by memory",
    )
    optimizer: Literal["adamw", "sgd", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit holds the state of large tensors in 8 bits"
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="updates of linear rise to learning_rate")
    warmup_ratio: Fraction | None = Field(None, description="in place of warmup_steps, a share of all updates")
    min_learning_rate: Annotated[float, Field(ge=0)] = Field(0.0, description="where linear and cosine end")
    betas: Annotated[tuple[Fraction, Fraction], FromList] = Field((0.9, 0.999), description="AdamW")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW")
    momentum: Fraction = Field(0.0, description="SGD")
    nesterov: bool = Field(False, description="SGD")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="null: no clipping")
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        "bf16", description="autocast dtype; fp16 adds loss scaling; tf32: all in fp32, a GPU's products in TF32"
    )
    activation_checkpointing: CheckpointingMode = Field(
        "none",
        description="none, block, every_2 ... every_N, attention, feed_forward, sublayer or projections "
        "(fused LoRA only: recomputes q, k, v, gate and up, but not attention)",
    )
    fused: bool = Field(
        True, description="compute LoRA blocks by hand-written functions that use less memory; false: the plain modules"
    )
    compile: bool = Field(False, description="torch.compile between the matrix products; it pays off in long runs")
    deterministic: bool = Field(
        False, description="on a GPU: equal runs give equal bytes, also when resumed; slower. On a CPU they always do"
    )
    memory_limit: MemorySize = Field(
        "auto",
        description="for example 24GiB; with activation_checkpointing: none, fused LoRA blocks recompute where a step "
        "would need more; auto: 90 % of the free memory",
    )
    rank_timeout_s: Annotated[float, Field(gt=0)] = Field(
        600.0, description="with several processes: how long one may not answer before all end"
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    log_every_steps: Positive = 1
    log_layer_grad_norms: bool = Field(False, description="each block's gradient norm at each step, before clipping")
    profile_steps: Positive | None = Field(
        None, description="write a torch.profiler trace of the first N windows after each start into the run directory"
    )
    save_every_steps: Positive | None = Field(None, description="default: every epoch")
    keep_last: Positive = Field(2, description="checkpoints kept")

    @model_validator(mode="after")
    def _agree(self) -> TrainingSection:
        epochs, steps, warmup, rate = self.num_epochs, self.max_steps, self.warmup_steps, self.learning_rate
        problems = {
            "num_epochs and max_steps exclude each other": epochs is not None and steps is not None,
            "warmup_steps and warmup_ratio exclude each other": self.warmup_ratio is not None and warmup,
            f"warmup_steps {warmup} is longer than the run of {steps} steps": steps is not None and warmup > steps,
            f"min_learning_rate {self.min_learning_rate} is above learning_rate {rate}": self.min_learning_rate > rate,
            "nesterov needs momentum": self.nesterov and not self.momentum,
        }
        if any(problems.values()):
            raise ValueError("; ".join(problem for problem, is_met in problems.items() if is_met))
        return self


class EvaluationSection(_Section):
    """When the validation loss is computed."""

    every_steps: Positive | None = Field(None, description="default: every epoch, when there is validation data")
    early_stopping_patience: Positive | None = Field(
        None, description="stop after this many evaluations in a row without a lower loss"
    )
    early_stopping_min_delta: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="patience counts a loss as lower only if it is more than this below the last one that counted; "
        "best/ is the lowest in any case",
    )

    @model_validator(mode="after")
    def _agree(self) -> EvaluationSection:
        if self.early_stopping_min_delta and self.early_stopping_patience is None:
            raise ValueError("early_stopping_min_delta needs early_stopping_patience")
        return self


class TrackingSection(_Section):
    """Trackers that receive the metrics; they change nothing that is computed."""

    tensorboard: bool = Field(False, description="event files in tensorboard/ of the run directory")
    wandb: Literal["offline", "online"] | None = Field(
        None, description="W&B: offline writes to wandb/ of the run directory, for wandb sync; null: off"
    )
    wandb_project: NonEmptyText = "llamatune"
    wandb_name: NonEmptyText | None = Field(None, description="default: the name of the run directory")


class RunSpec(_Section):
    """Everything that decides what a training run computes."""

    model: ModelSection
    lora: LoraSection | None = Field(None, description="omit the section to train every parameter")
    data: DataSection
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _agree(self) -> RunSpec:
        model, lora, training = self.model, self.lora, self.training
        if lora is None and model.dtype == "nf4":
            fault = "nf4 weights are frozen and nothing would be trained"
            raise ValueError(f"{fault}; add a lora section, or set model.dtype: float32")
        if lora is None and model.placement in ("host", "shard"):
            fault = f"model.placement: {model.placement} is for frozen weights; add a lora section, or set it to device"
            raise ValueError(fault)
        if model.quantized_cache is not None and (model.dtype != "nf4" or model.init == "random"):
            raise ValueError("model.quantized_cache is for model.dtype: nf4 and pretrained weights; leave it out")
        if lora is None and model.dtype != "float32":
            raise ValueError(
                f"training every parameter in {model.dtype} loses small updates; without a lora section set "
                "model.dtype: float32 (training.precision may still be bf16 or fp16)"
            )
        if training.activation_checkpointing == "projections" and (lora is None or not training.fused):
            raise ValueError(
                "activation_checkpointing: projections is for a lora section and training.fused: true; "
                "the plain modules have sublayer and block"
            )
        if lora is not None and model.init == "random" and lora.init_from:
            raise ValueError("lora.init_from needs the base it was trained on, not model.init: random")
        return self

    @property
    def adapter(self) -> AdapterSpec | None:
        """The adapter that is trained; None: every parameter is."""
        lora = self.lora
        return None if lora is None else AdapterSpec(lora.r, lora.alpha, lora.dropout, lora.target_modules)

    def to_yaml(self) -> str:
        """The resolved spec, every default written out; ``load_spec`` reads it back to an equal one."""
        values = self.model_dump(mode="json")
        if values["lora"] is None:
            del values["lora"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def flat(self) -> dict[str, Any]:
        """Every value by its key path, as ``training.seed``."""
        return dict(_flat(self.model_dump(mode="json")))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _known_keys(section: str | None = None) -> list[str]:
    """The keys of a section, or the sections."""
    kind = RunSpec if section is None else RunSpec.model_fields[section].annotation
    return list((*typing.get_args(kind), kind)[0].model_fields)


def _describe(error: Any) -> str:
    location = [key for key in error["loc"] if isinstance(key, str)]
    path = ".".join(location) or "spec"
    given = error.get("input")
    match error["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(location[-1], _known_keys(*location[:-1]), 1, 0.5)
            return f"{path}: unknown key" + (f", did you mean {near[0]!r}?" if near else "")
        case "missing":
            return f"{path}: missing"
        case "value_error":
            return f"{path}: {error['ctx']['error']}"
    shown = f" (it is {given!r})" if isinstance(given, str | int | float | None) else ""
    return f"{path}: {error['msg'].replace('Input should be', 'should be')}{shown}"


def build_spec(values: Any, where: object, overrides: Sequence[str] = ()) -> RunSpec:
    """A spec from plain values; each ``section.key=value`` of ``overrides`` replaces one."""
    if not isinstance(values, dict):
        raise SpecError("not a mapping of sections", where, f"sections are {', '.join(RunSpec.model_fields)}")
    for section in ("evaluation", "tracking"):
        if values.get(section, ()) is None:
            del values[section]
    if values.get("lora", ()) is None:
        raise SpecError("lora: empty", where, "write lora: {} for its defaults, or omit it to train every parameter")
    rename_aliases(values, where)
    for assignment in overrides:
        override(values, assignment)
    try:
        return RunSpec.model_validate(values)
    except ValidationError as fault:
        described = [_describe(error) for error in fault.errors()]
    count = f"{len(described)} errors: " if len(described) > 1 else ""
    raise SpecError(count + "; ".join(described), where)


def load_spec(path: Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read a run spec from a file; no two ``overrides`` may set the same field."""
    refuse_twice(overrides)
    return build_spec(read_yaml(path), path, overrides)
