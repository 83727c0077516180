"""Model and optimizer of a run: the base with its adapter on the device, optimizer, loss scaler and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llamatune.checkpoints.loading import load_model
from llamatune.checkpoints.nf4_cache import QuantizedBase
from llamatune.events import OnEvent, ShouldStop
from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter, load_adapter_tensors
from llamatune.model.initialise import initialise
from llamatune.model.nf4 import quantize_blocks
from llamatune.model.transformer import Transformer
from llamatune.seeds import derived_seed
from llamatune.shapes.recompute_levels import Levels
from llamatune.spec import RunSpec, TrainingSection
from llamatune.training.inputs import Inputs
from llamatune.training.optimizers.adamw_8bit import AdamW8bit
from llamatune.training.optimizers.optimizer import SGD, AdamW, Optimizer
from llamatune.training.precision import LossScaler, autocast_factory, held_dtype, residual_dtype


@dataclass(frozen=True)
class Learner:
    """The model on its device and what changes it. ``parameters`` are the trained ones by checkpoint name."""

    model: Transformer
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    scaler: LossScaler
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    device: torch.device


def build_learner(
    spec: RunSpec, inputs: Inputs, on_event: OnEvent, should_stop: ShouldStop, levels: Levels | None = None
) -> Learner:
    """Load the base, apply the adapter and its starting weights, and build the optimizer over what is trained.

    ``levels`` say what each fused block recomputes; None: as ``training.activation_checkpointing`` says.
    """
    model, adapter = _load_base(spec, inputs, on_event, should_stop), spec.adapter
    if adapter is None:
        model.requires_grad_(True)
        parameters = dict(model.named_parameters())
    else:
        apply_adapter(model, adapter, derived_seed(spec.training.seed, "lora"))
        if inputs.starting_adapter is not None:
            load_adapter_tensors(model, inputs.starting_adapter.tensors)
        parameters = dict(adapter_parameters(model))
    training, device = spec.training, inputs.device
    fused = training.fused and adapter is not None
    apply_activation_checkpointing(model, training.activation_checkpointing, fused, levels)
    model.train()
    optimizer, scaler = build_optimizer(training, parameters), LossScaler(training.precision == "fp16")
    return Learner(model, parameters, optimizer, scaler, autocast_factory(training.precision, device), device)


def build_optimizer(spec: TrainingSection, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimizer that a spec names."""
    if spec.optimizer == "sgd":
        return Optimizer(parameters, SGD(spec.momentum, spec.nesterov, spec.weight_decay))
    rule = AdamW8bit if spec.optimizer == "adamw_8bit" else AdamW
    return Optimizer(parameters, rule(spec.betas, spec.eps, spec.weight_decay))


def _load_base(spec: RunSpec, inputs: Inputs, on_event: OnEvent, should_stop: ShouldStop) -> Transformer:
    """The base model, read from its checkpoint or drawn at random."""
    dtype, nf4 = held_dtype(spec), spec.model.dtype == "nf4"
    if inputs.checkpoint is None:
        with inputs.device, _default_dtype(dtype):  # a large model is never held in fp32 first
            model = Transformer(inputs.config)
        initialise(model, spec.training.seed)
        if nf4:
            quantize_blocks(model, dtype)
    else:
        quantized = None
        if nf4:
            quantized = QuantizedBase(inputs.checkpoint, inputs.config, inputs.device, on_event, should_stop)
            if spec.model.quantized_cache is not None:
                quantized.use_cache(Path(spec.model.quantized_cache), inputs.base_fingerprint)
        model = load_model(
            inputs.checkpoint,
            dtype,
            inputs.device,
            spec.model.num_layers,
            writable=spec.lora is None or not spec.model.memory_map,
            on_event=on_event,
            should_stop=should_stop,
            quantized=quantized,
        )
    model.activation_dtype = residual_dtype(dtype, spec.training.precision)
    return model


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
