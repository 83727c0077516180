"""From a spec to everything that a step needs, checked from the cheapest to the dearest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llamatune.checkpoints.adapter import Adapter, check_adapter, load_adapter
from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.checkpoints.model_directory import read_config
from llamatune.checkpoints.nf4_cache import QuantizedBase
from llamatune.data.dataset import Prepared, Split, check_rows, check_tokenizer, open_prepared
from llamatune.data.packing import pack
from llamatune.devices import choose_device
from llamatune.errors import CheckpointError, SpecError
from llamatune.events import OnEvent, ShouldStop
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter, load_adapter_tensors
from llamatune.model.checkpointing import apply_activation_checkpointing
from llamatune.model.initialise import initialise
from llamatune.model.nf4 import quantize_blocks
from llamatune.model.transformer import Transformer
from llamatune.seeds import derived_seed
from llamatune.shapes.config import LlamaConfig
from llamatune.shapes.counts import ParameterCount, count_parameters
from llamatune.shapes.levels import Levels
from llamatune.spec import RunSpec
from llamatune.training.optimizer import Optimizer, build_optimizer, warmup_steps
from llamatune.training.precision import LossScaler, autocast_factory, check_precision, held_dtype, residual_dtype


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked against each other; no weights are loaded yet."""

    config: LlamaConfig
    checkpoint: Checkpoint | None
    base_fingerprint: str
    prepared: Prepared
    validation: Split | None
    starting_adapter: Adapter | None
    digests: dict[str, Any]
    count: ParameterCount
    device: torch.device


@dataclass(frozen=True)
class Schedule:
    """How many windows an epoch has, and where the run ends; a window is one accumulation of micro-batches.

    A row is a sample, or several packed ones.
    """

    rows: int
    rows_per_window: int
    windows_per_epoch: int
    num_epochs: int
    total_steps: int


@dataclass(frozen=True)
class Learner:
    """The model on its device and what changes it. ``parameters`` are the trained ones by checkpoint name."""

    model: Transformer
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    scaler: LossScaler
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    device: torch.device


def open_inputs(spec: RunSpec, force_base: bool, on_event: OnEvent) -> Inputs:
    """Open the base and the data, and refuse what does not fit together."""
    device = choose_device(spec.training.device, on_event)
    check_precision(spec, device, on_event)
    prepared = open_prepared(Path(spec.data.train))
    validation, validation_digest = prepared.validation, None
    if spec.data.validation is not None:
        other = open_prepared(Path(spec.data.validation))
        validation, validation_digest = other.train, other.manifest.digest
    base = Path(spec.model.path)
    if spec.model.init == "random":
        checkpoint, config = None, read_config(base).with_layers(spec.model.num_layers)
        base_fingerprint = f"random:{spec.training.seed}"
    else:
        checkpoint = open_checkpoint(base)
        config = checkpoint.config.with_layers(spec.model.num_layers)
        base_fingerprint = fingerprint(checkpoint)
    if validation is None and (spec.evaluation.every_steps or spec.evaluation.early_stopping_patience):
        raise SpecError(
            "there is no validation data to evaluate on",
            "evaluation",
            "prepare it with --validation-fraction, name it in data.validation, or drop the section",
        )
    check_rows(prepared.train, config, f"{spec.data.train} against {base}", on_event)
    if validation is not None:
        check_rows(validation, config, f"{spec.data.validation or spec.data.train} against {base}", on_event)
    check_tokenizer(prepared, base, force_base, on_event)
    starting_adapter = _starting_adapter(spec, config, base_fingerprint, force_base, on_event)
    count = count_parameters(config, spec.adapter)
    digests = {"base": base_fingerprint, "train": prepared.manifest.digest, "validation": validation_digest}
    return Inputs(config, checkpoint, base_fingerprint, prepared, validation, starting_adapter, digests, count, device)


def packing_budget(spec: RunSpec) -> int | None:
    """Tokens of a packed row; None: no packing."""
    return spec.data.packed_tokens if spec.data.packing else None


def plan_schedule(spec: RunSpec, train: Split) -> Schedule:
    """Count windows and steps; the last window of an epoch may be partial."""
    training, budget = spec.training, packing_budget(spec)
    rows = len(train) if budget is None else len(pack(train.lengths, budget, range(len(train))))
    rows_per_window = training.micro_batch_size * training.gradient_accumulation_steps
    windows_per_epoch = -(-rows // rows_per_window)
    if training.max_steps is not None:
        schedule = Schedule(
            rows, rows_per_window, windows_per_epoch, -(-training.max_steps // windows_per_epoch), training.max_steps
        )
    else:
        epochs = training.num_epochs or 5
        schedule = Schedule(rows, rows_per_window, windows_per_epoch, epochs, epochs * windows_per_epoch)
    warmup_steps(training, schedule.total_steps)
    return schedule


def micro_batch_tokens(spec: RunSpec, train: Split) -> float:
    """Tokens of the average micro-batch; a packed row counts as full."""
    tokens = sum(train.lengths)
    row_tokens = packing_budget(spec) or tokens / len(train)
    return min(tokens, spec.training.micro_batch_size * row_tokens)


def build_learner(
    spec: RunSpec, inputs: Inputs, on_event: OnEvent, should_stop: ShouldStop, levels: Levels | None = None
) -> Learner:
    """Load the base, put LoRA in, and build the optimizer over what is trained.

    ``levels`` are what fused blocks recompute; None: by ``training.activation_checkpointing``.
    """
    dtype, nf4 = held_dtype(spec), spec.model.dtype == "nf4"
    if inputs.checkpoint is None:
        with inputs.device, _default_dtype(dtype):  # no fp32 copy of a large model on the way
            model = Transformer(inputs.config)
        initialise(model, spec.training.seed)
        if nf4:
            quantize_blocks(model, dtype)
    else:
        model = load_model(
            inputs.checkpoint,
            dtype,
            inputs.device,
            spec.model.num_layers,
            writable=spec.lora is None or not spec.model.memory_map,
            on_event=on_event,
            should_stop=should_stop,
            quantized=_quantized_base(spec, inputs, on_event, should_stop) if nf4 else None,
        )
    model.activation_dtype = residual_dtype(dtype, spec.training.precision)
    adapter = spec.adapter
    if adapter is None:
        model.requires_grad_(True)
        parameters = dict(model.named_parameters())
    else:
        apply_adapter(model, adapter, derived_seed(spec.training.seed, "lora"))
        if inputs.starting_adapter is not None:
            load_adapter_tensors(model, inputs.starting_adapter.tensors)
        parameters = dict(adapter_parameters(model))
    lean = spec.training.fused and adapter is not None
    apply_activation_checkpointing(model, spec.training.activation_checkpointing, lean, levels)
    model.train()
    return Learner(
        model,
        parameters,
        build_optimizer(spec.training, parameters),
        LossScaler(spec.training.precision == "fp16"),
        autocast_factory(spec.training.precision, inputs.device),
        inputs.device,
    )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _quantized_base(spec: RunSpec, inputs: Inputs, on_event: OnEvent, should_stop: ShouldStop) -> QuantizedBase:
    assert inputs.checkpoint is not None
    base = QuantizedBase(inputs.checkpoint, inputs.config, inputs.device, on_event, should_stop)
    if spec.model.quantized_cache is not None:
        base.use_cache(Path(spec.model.quantized_cache), inputs.base_fingerprint)
    return base


def _starting_adapter(
    spec: RunSpec, config: LlamaConfig, base_fingerprint: str, force_base: bool, on_event: OnEvent
) -> Adapter | None:
    wanted = spec.adapter
    if wanted is None or spec.lora is None or spec.lora.init_from is None:
        return None
    adapter = load_adapter(Path(spec.lora.init_from))
    check_adapter(adapter, config, base_fingerprint, force_base, on_event)
    found = adapter.config
    if (found.r, found.target_modules, found.scaling()) != (wanted.r, wanted.target_modules, wanted.scaling()):
        raise CheckpointError(
            f"the adapter has r {found.r}, alpha {found.alpha:g} on {', '.join(found.target_modules)}",
            spec.lora.init_from,
            "give the lora section the same values",
        )
    return adapter
