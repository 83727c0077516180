"""Sections of the run spec: the keys of model, lora, data, training, evaluation and tracking, defaults and bounds.

A field owns its name, default, bounds and description; docs/run-spec.md is made from it. No torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from llamatune.spec_types import (
    Alpha,
    CheckpointingMode,
    Device,
    Directories,
    Duration,
    Epochs,
    Fraction,
    FromList,
    LearningRate,
    MemorySize,
    NonEmptyText,
    PathText,
    Positive,
    Rank,
    Steps,
    TargetModules,
    WholeModules,
)

DEFAULT_EPOCHS = 5
LORA_LEARNING_RATE, FULL_LEARNING_RATE = 3e-4, 2e-5
"""What ``training.learning_rate: null`` stands for; the evidence is in ``docs/learning-rate.md``."""


class Section(BaseModel):
    """Unknown keys, and values of other types, are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which base model, and how its weights are held."""

    path: PathText = Field(description="a directory in Meta's or Hugging Face's format")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random reads only the configuration and draws the weights from training.seed"
    )
    dtype: Literal["float32", "bfloat16", "float16", "nf4", "float8", "int8"] = Field(
        "bfloat16", description="how frozen weights are held; nf4 (QLoRA), float8 and int8 need a lora section"
    )
    quantized_cache: PathText | None = Field(
        None, description="of quantised dtypes: a directory that keeps the weights of each base, made at the first run"
    )
    placement: Literal["auto", "device", "host", "shard"] = Field(
        "auto",
        description="where frozen blocks lie: on the device, in host memory, or in slices on all ranks; auto: "
        "device if a step fits there, else host on one GPU, shard with several processes",
    )
    variant: NonEmptyText | None = Field(
        None, description="of a Hugging Face directory: fp16 reads model.fp16.safetensors in place of model.safetensors"
    )
    num_layers: Positive | None = Field(None, description="keep only the first N layers, for debugging")
    memory_map: bool = Field(
        True,
        description="on a CPU: frozen weights are memory-mapped; false reads them into memory, for file systems on "
        "which a file may change or vanish during the run",
    )
    verify: Literal["full", "sample"] = Field(
        "full",
        description="full: the SHA-256 of the base's files is taken behind the first steps and compared when the run "
        "goes on, and by verify; sample: only a few rows of each tensor are compared",
    )


class LoraSection(Section):
    """The trained low-rank update."""

    kind: Literal["lora", "dora", "lora_fa"] = Field(
        "lora",
        description="dora also trains the magnitude of each row of the updated matrix; lora_fa trains B alone, A stays "
        "as it was drawn",
    )
    r: Rank = Field(16, description="rank")
    alpha: Alpha = Field(32.0, description="the update is scaled by alpha / r")
    use_rslora: bool = Field(False, description="the update is scaled by alpha / sqrt(r)")
    ranks: dict[str, Rank] = Field({}, description="other ranks of some target modules, as q_proj: 8")
    alphas: dict[str, Alpha] = Field({}, description="other alphas of some target modules")
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = Field(
        "kaiming",
        description="how A is drawn, B being zero; pissa and olora begin with parts of the base's matrices, and the "
        "adapter that is written is plain LoRA of twice the rank",
    )
    lr_ratio: Annotated[float, Field(gt=0)] = Field(
        1.0, description="LoRA+: the learning rate of B, and of dora's magnitudes, over that of all else"
    )
    dropout: Fraction = Field(0.05, description="on the input of A")
    target_modules: TargetModules = Field(
        ("q_proj", "v_proj"), description="any of the seven linear layers, or all-linear"
    )
    modules_to_save: WholeModules = Field(
        (),
        description="any of embed_tokens, lm_head and norm (the final one): trained whole, in fp32, beside the update",
    )
    init_from: PathText | None = Field(None, description="an adapter directory to start from")

    @model_validator(mode="after")
    def _agree(self) -> LoraSection:
        for key, values in (("ranks", self.ranks), ("alphas", self.alphas)):
            for name in values:
                if name not in self.target_modules:
                    targets = ", ".join(self.target_modules)
                    raise ValueError(f"{key} names {name!r}, which is none of lora.target_modules: {targets}")
        if self.init in ("pissa", "olora") and self.kind != "lora":
            raise ValueError(f"init: {self.init} is for kind: lora, not {self.kind}; use kaiming or gaussian")
        if self.init != "kaiming" and self.init_from is not None:
            raise ValueError(f"init_from and init: {self.init} exclude each other: the adapter is where it starts")
        if self.modules_to_save and self.init_from is not None:
            raise ValueError("init_from and modules_to_save exclude each other: merge the adapter and start from that")
        if self.kind == "lora_fa" and self.lr_ratio != 1:
            raise ValueError("lr_ratio is between the rates of B and A, and kind: lora_fa does not train A")
        return self


class DataSection(Section):
    """Which prepared rows."""

    train: Directories = Field(
        description="a directory written by prepare-data, or a list of them, whose rows are joined in that order"
    )
    validation: Directories | None = Field(
        None, description="another one, or a list; by default the validation splits inside train"
    )
    packing: bool = Field(
        False, description="several samples in one row, attention within each sample; micro_batch_size counts rows"
    )
    packed_tokens: Positive = Field(2048, description="the most tokens in a packed row; a longer sample is a row alone")
    shuffle: bool = Field(True, description="a permutation of (seed, epoch); false keeps the file's order")

    @property
    def train_paths(self) -> tuple[Path, ...]:
        """The directories of ``train``."""
        return _paths(self.train)

    @property
    def validation_paths(self) -> tuple[Path, ...]:
        """The directories of ``validation``; none where the splits inside ``train`` are used."""
        return () if self.validation is None else _paths(self.validation)


def _paths(named: str | tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(map(Path, (named,) if isinstance(named, str) else named))


class TrainingSection(Section):
    """How the weights are trained."""

    output_dir: PathText = Field(description="the run directory")
    num_epochs: Epochs | None = Field(
        None,
        description=f"passes over the rows, {DEFAULT_EPOCHS} if max_steps is not given either; 0.5 or 2.5 ends inside "
        "one, after a whole update",
    )
    max_steps: Steps | None = Field(None, description="optimizer updates, in place of num_epochs")
    micro_batch_size: Positive = Field(1, le=1 << 16, description="rows in one forward pass")
    gradient_accumulation_steps: Positive = Field(8, le=1 << 20, description="micro-batches per update")
    tokens_per_pass: Positive | Literal["auto"] | None = Field(
        "auto",
        description="micro-batches are computed together up to so many tokens; null: each alone; auto: by memory",
    )
    optimizer: Literal["adamw", "sgd", "adamw_8bit"] = Field(
        "adamw", description="adamw_8bit holds the state of large tensors in 8 bits"
    )
    learning_rate: LearningRate = Field(
        None,
        description=f"null: {LORA_LEARNING_RATE:g} with a lora section, else {FULL_LEARNING_RATE:g}; auto: found "
        "before the first step, in at most 64 micro-batches ([learning-rate.md](learning-rate.md))",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="decoupled, as of AdamW")
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
    kernels: Literal["auto", "plain"] = Field(
        "auto", description="auto: Triton kernels on a GPU of compute capability 8.0 and later; plain: torch alone"
    )
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
    max_time: Duration | None = Field(
        None,
        description="each start of the run stops in time, saved and with exit code 75, before it has run for so long: "
        "30m, 1h30m, 2d, or as Slurm writes it; the same command goes on. A Slurm job's own limit needs no key",
    )
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = Field(0, description="of A's start, dropout and the rows' order")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N; auto: a GPU if there is one")
    log_every_steps: Positive = Field(1, description="of lines on stderr; metrics.jsonl has every step")
    log_layer_grad_norms: bool = Field(False, description="each block's gradient norm at each step, before clipping")
    profile_steps: Positive | None = Field(
        None, description="write a torch.profiler trace of the first N windows after each start into the run directory"
    )
    save_every_steps: Positive | None = Field(None, description="default: every epoch")
    keep_last: Positive = Field(2, description="checkpoints kept")

    @property
    def rate(self) -> float:
        """``learning_rate`` of a run that has begun, which is a number: neither null nor auto."""
        assert isinstance(self.learning_rate, float)
        return self.learning_rate

    @model_validator(mode="after")
    def _agree(self) -> TrainingSection:
        epochs, steps, warmup, rate = self.num_epochs, self.max_steps, self.warmup_steps, self.learning_rate
        is_above = isinstance(rate, float) and self.min_learning_rate > rate
        problems = {
            "num_epochs and max_steps exclude each other": epochs is not None and steps is not None,
            "warmup_steps and warmup_ratio exclude each other": self.warmup_ratio is not None and warmup,
            f"warmup_steps {warmup} is longer than the run of {steps} steps": steps is not None and warmup > steps,
            f"min_learning_rate {self.min_learning_rate} is above learning_rate {rate}": is_above,
            "nesterov needs momentum": self.nesterov and not self.momentum,
        }
        if any(problems.values()):
            raise ValueError("; ".join(problem for problem, is_met in problems.items() if is_met))
        return self


class EvaluationSection(Section):
    """When the validation loss is computed."""

    every_steps: Positive | None = Field(None, description="default: every epoch, when there is validation data")
    at_start: bool = Field(
        True,
        description="when there is validation data, also before the first step, which comes later by that time; it "
        "counts neither for best/ nor for patience",
    )
    prompts: Annotated[int, Field(ge=1, le=64)] | PathText | None = Field(
        None,
        description="answered greedily at each evaluation, and before the first step; a file, as generate "
        "--prompt-file reads it, or a number of rows, drawn by the seed from the validation rows (training rows where "
        "there are none). Without validation data, at the end of each epoch",
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = Field(128, description="of an answer to one of prompts")
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


class TrackingSection(Section):
    """Trackers that receive the metrics; they change nothing that is computed."""

    tensorboard: bool = Field(False, description="event files in tensorboard/ of the run directory")
    wandb: Literal["offline", "online"] | None = Field(
        None, description="W&B: offline writes to wandb/ of the run directory, for wandb sync; null: off"
    )
    wandb_project: NonEmptyText = Field("llamatune", description="W&B's project")
    wandb_name: NonEmptyText | None = Field(None, description="default: the name of the run directory")
