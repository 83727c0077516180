"""The learner: the model with its adapter on the device, the optimizer, the loss scaler and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from llamatune.checkpoints.loading import load_model
from llamatune.checkpoints.nf4_cache import QuantizedBase
from llamatune.events import OnEvent, ShouldStop
from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter, load_adapter_tensors
from llamatune.model.block_stores import HostBlocks, ShardedBlocks
from llamatune.model.initialise import drawn_weights
from llamatune.model.nf4 import Scratch, hold_quantized, quantize_nf4
from llamatune.model.streamed_blocks import BlockLayout, StreamedBlocks
from llamatune.model.transformer import Transformer
from llamatune.ranks import ALONE, Ranks
from llamatune.seeds import derived_seed
from llamatune.shapes.llama_config import LINEAR_MODULES
from llamatune.shapes.recompute_levels import Levels
from llamatune.spec import RunSpec, TrainingSection
from llamatune.training.inputs import Inputs
from llamatune.training.optimizers.adamw_8bit import AdamW8bit
from llamatune.training.optimizers.optimizer import SGD, AdamW, Optimizer
from llamatune.training.precision import LossScaler, autocast_factory, held_dtype, residual_dtype


@dataclass(frozen=True)
class Learner:
    """The model on its device and what changes it. ``parameters`` are the trained ones by checkpoint name.

    ``streamed``: the frozen weights of the blocks, where they do not lie on the device.
    """

    model: Transformer
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    scaler: LossScaler
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    device: torch.device
    streamed: StreamedBlocks | None = None


def build_learner(
    spec: RunSpec,
    inputs: Inputs,
    on_event: OnEvent,
    should_stop: ShouldStop,
    levels: Levels | None = None,
    ranks: Ranks = ALONE,
) -> Learner:
    """Load the base, apply the adapter and its starting weights, and build the optimizer over what is trained.

    ``levels`` say what each fused block recomputes; None: as ``training.activation_checkpointing`` says. Of
    ``model.placement`` ``auto`` is ``device`` here.
    """
    streamed = _streamed_blocks(spec, inputs, ranks)
    model, adapter = _load_base(spec, inputs, on_event, should_stop, streamed, ranks), spec.adapter
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
    if streamed is not None:
        streamed.attach(model)
    model.train()
    optimizer, scaler = build_optimizer(training, parameters), LossScaler(training.precision == "fp16")
    return Learner(model, parameters, optimizer, scaler, autocast_factory(training.precision, device), device, streamed)


def build_optimizer(spec: TrainingSection, parameters: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimizer that a spec names."""
    if spec.optimizer == "sgd":
        return Optimizer(parameters, SGD(spec.momentum, spec.nesterov, spec.weight_decay))
    rule = AdamW8bit if spec.optimizer == "adamw_8bit" else AdamW
    return Optimizer(parameters, rule(spec.betas, spec.eps, spec.weight_decay))


def _streamed_blocks(spec: RunSpec, inputs: Inputs, ranks: Ranks) -> StreamedBlocks | None:
    """Empty room for the base's blocks where ``model.placement`` says; None: on the device."""
    placement, device = spec.model.placement, inputs.device
    if placement not in ("host", "shard"):
        return None
    layout = BlockLayout(inputs.config, held_dtype(spec), spec.model.dtype == "nf4")
    size = layout.layers, layout.bytes
    store = HostBlocks(*size, device) if placement == "host" else ShardedBlocks(*size, device, ranks)
    return StreamedBlocks(layout, store, device)


def _load_base(
    spec: RunSpec,
    inputs: Inputs,
    on_event: OnEvent,
    should_stop: ShouldStop,
    streamed: StreamedBlocks | None,
    ranks: Ranks,
) -> Transformer:
    """The base model, read from its checkpoint or drawn at random."""
    dtype, nf4 = held_dtype(spec), spec.model.dtype == "nf4"
    if inputs.checkpoint is None:
        model = _draw_base(inputs, spec.training.seed, dtype, nf4, streamed)
    else:
        quantized = None
        if nf4:
            quantized = QuantizedBase(inputs.checkpoint, inputs.config, inputs.device, on_event, should_stop)
            if spec.model.quantized_cache is not None:
                if not ranks.is_first:
                    ranks.wait()  # the first may write the cache
                quantized.use_cache(Path(spec.model.quantized_cache), inputs.base_fingerprint)
                if ranks.is_first:
                    ranks.wait()
        model = load_model(
            inputs.checkpoint,
            dtype,
            inputs.device,
            spec.model.num_layers,
            writable=spec.lora is None or not spec.model.memory_map,
            on_event=on_event,
            should_stop=should_stop,
            quantized=quantized,
            streamed=streamed,
        )
    model.activation_dtype = residual_dtype(dtype, spec.training.precision)
    return model


def _draw_base(
    inputs: Inputs, seed: int, dtype: torch.dtype, nf4: bool, streamed: StreamedBlocks | None
) -> Transformer:
    """A base drawn at random, tensor by tensor: a large model is never held in fp32, nor whole before it is packed."""
    with torch.device("meta"):
        model = Transformer(inputs.config)
    scratch = Scratch()
    for name, drawn in drawn_weights(model, seed):
        module, weight = model.get_submodule(name.rpartition(".")[0]), drawn.to(inputs.device, dtype)
        if nf4 and name.split(".")[-2] in LINEAR_MODULES:
            packed = quantize_nf4(weight, scratch)
            if streamed is not None:
                streamed.hold_packed(name, packed)
            hold_quantized(module, packed)
            continue
        if streamed is not None and streamed.rows_kept(name) is not None:
            weight = streamed.hold(name, weight)
        module.weight = nn.Parameter(weight)
    return model
