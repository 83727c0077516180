"""Model and optimizer of a run: the base with its adapter on the device, optimizer, loss scaler and autocast."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llamatune.checkpoints.loading import load_model, load_rows, warn_of_broken
from llamatune.checkpoints.quantized_base import QuantizedBase
from llamatune.errors import Stopped
from llamatune.events import OnEvent, Progress, ShouldStop
from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter, load_adapter_tensors
from llamatune.model.initialise import drawn_weights
from llamatune.model.packed_weight import PackedWeight, Scratch, hold_quantized
from llamatune.model.quantization import QUANTIZATIONS
from llamatune.model.streamed_blocks import StreamedBlocks, stream_blocks
from llamatune.model.transformer import Transformer
from llamatune.ranks import ALONE, Ranks
from llamatune.seeds import derived_seed
from llamatune.shapes.adapter import ADAPTER_KINDS, AdapterSpec
from llamatune.shapes.llama_config import linear_module
from llamatune.shapes.parameter_shards import Shard
from llamatune.shapes.recompute_levels import Levels
from llamatune.spec import RunSpec
from llamatune.spec_sections import TrainingSection
from llamatune.training.inputs import Inputs
from llamatune.training.optimizers.adamw_8bit import AdamW8bit
from llamatune.training.optimizers.optimizer import SGD, AdamW, Optimizer
from llamatune.training.optimizers.sharded_adamw_8bit import ShardedAdamW8bit
from llamatune.training.precision import LossScaler, autocast_factory, held_dtype, residual_dtype
from llamatune.training.sharded_model import ShardedModel

LoadBase = Callable[[RunSpec, Inputs, OnEvent, ShouldStop], Transformer]


@dataclass(frozen=True)
class Learner:
    """The model on its device and what changes it. ``parameters`` are the trained ones by checkpoint name.

    ``streamed``: the frozen weights of the blocks, where they do not lie on the device. ``sharded``: every parameter is
    trained on several ranks; ``parameters`` are this rank's slices.
    """

    model: Transformer
    parameters: dict[str, nn.Parameter]
    optimizer: Optimizer
    scaler: LossScaler
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    device: torch.device
    streamed: StreamedBlocks | None = None
    sharded: ShardedModel | None = None

    @property
    def idle_forward(self) -> Callable[[], None] | None:
        """What a rank without a batch does while others compute one without gradients; None: nothing."""
        if self.sharded is not None:
            return self.sharded.idle
        return None if self.streamed is None else functools.partial(self.streamed.idle, backward=False)


def build_learner(
    spec: RunSpec,
    inputs: Inputs,
    on_event: OnEvent,
    should_stop: ShouldStop,
    levels: Levels | None = None,
    ranks: Ranks = ALONE,
    drawn_on: torch.device | str = "cpu",
    load_base: LoadBase | None = None,
) -> Learner:
    """Load the base, apply the adapter and its starting weights, and build the optimizer over what is trained.

    ``levels`` say what each fused block recomputes; None: as ``training.activation_checkpointing`` says. Of
    ``model.placement`` ``auto`` is ``device`` here. A random base is ``drawn_on`` a CPU, for the same weights whatever
    the device of the run, or where it is quicker. ``load_base`` gives the model where several runs share its weights.
    """
    if spec.adapter is None and ranks.size > 1:
        return _build_sharded(spec, inputs, on_event, should_stop, ranks)
    placement, packed = spec.model.placement, QUANTIZATIONS.get(spec.model.dtype)
    streamed = stream_blocks(placement, inputs.config, held_dtype(spec), packed, inputs.device, ranks)
    if load_base is None:
        model = load_own_base(spec, inputs, on_event, should_stop, streamed, ranks, drawn_on)
    else:
        model = load_base(spec, inputs, on_event, should_stop)
    adapter = spec.adapter
    if adapter is None:
        model.requires_grad_(True)
        parameters = dict(model.named_parameters())
    else:
        parameters = _put_on(model, adapter, spec, inputs, on_event, should_stop, streamed, ranks)
    training, device = spec.training, inputs.device
    fused = training.fused and adapter is not None
    apply_activation_checkpointing(model, training.activation_checkpointing, fused, levels)
    if streamed is not None:
        streamed.attach(model)
    model.train()
    optimizer = build_optimizer(training, parameters, lr_ratio=1.0 if spec.lora is None else spec.lora.lr_ratio)
    scaler = LossScaler(training.precision == "fp16")
    return Learner(model, parameters, optimizer, scaler, autocast_factory(training.precision, device), device, streamed)


def _put_on(
    model: Transformer,
    adapter: AdapterSpec,
    spec: RunSpec,
    inputs: Inputs,
    on_event: OnEvent,
    should_stop: ShouldStop,
    streamed: StreamedBlocks | None,
    ranks: Ranks,
) -> dict[str, nn.Parameter]:
    """Put the adapter on the model, with its first values; the trained parameters."""
    start, layers = inputs.starting_adapter, inputs.config.num_hidden_layers
    seed = derived_seed(spec.training.seed, "lora") if start is None else None

    def bring_block(layer: int) -> None:
        if should_stop():
            raise Stopped("stopped while the adapter was begun", spec.model.path, "run the same command again")
        on_event(Progress("beginning the adapter", layer + 1, layers))
        if streamed is not None:
            streamed.bring(layer)

    with autocast_factory(spec.training.precision, inputs.device)():  # a quantised base is unpacked as for products
        apply_adapter(model, adapter, seed, bring_block)
    parameters = dict(adapter_parameters(model))
    if start is not None:
        load_adapter_tensors(model, start.tensors)
    elif ADAPTER_KINDS[adapter.kind].reads_base and ranks.size > 1:  # another processor may round otherwise
        with torch.no_grad():
            for name, parameter in parameters.items():
                if name not in adapter.whole_names:
                    parameter.copy_(ranks.all_gather(parameter.detach())[0])
    return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}


def _build_sharded(spec: RunSpec, inputs: Inputs, on_event: OnEvent, should_stop: ShouldStop, ranks: Ranks) -> Learner:
    """Every parameter trained, a slice of each on every rank; a rank reads its slices and nothing else."""
    training, device = spec.training, inputs.device
    with torch.device("meta"):
        model, shapes = Transformer(inputs.config), Transformer(inputs.config)
    model.activation_dtype = residual_dtype(held_dtype(spec), training.precision)
    apply_activation_checkpointing(model, training.activation_checkpointing, fused=False)
    sharded = ShardedModel(model, device, ranks)
    slices = {name: (parameter, sharded.rows(name)) for name, parameter in sharded.parameters.items()}
    if inputs.checkpoint is None:
        with torch.no_grad():
            for name, drawn in drawn_weights(shapes, training.seed):
                into, rows = slices[name]
                into.copy_(drawn[rows.start : rows.stop])
    else:
        broken = ranks.gather(load_rows(inputs.checkpoint, slices, on_event, should_stop))
        warn_of_broken(sorted({name for names in broken for name in names}), inputs.checkpoint, on_event)
    model.train()
    autocast = autocast_factory(training.precision, device, keep_casts=False)  # of all blocks, they are the whole model

    @contextlib.contextmanager
    def forward() -> Iterator[None]:
        with sharded.exchanging(), autocast():
            yield

    optimizer = build_optimizer(training, sharded.parameters, sharded, ranks)
    scaler = LossScaler(training.precision == "fp16")
    return Learner(model, sharded.parameters, optimizer, scaler, forward, device, sharded=sharded)


def build_optimizer(
    spec: TrainingSection,
    parameters: Mapping[str, nn.Parameter],
    sharded: ShardedModel | None = None,
    ranks: Ranks = ALONE,
    lr_ratio: float = 1.0,
) -> Optimizer:
    """The optimizer that a spec names; ``lr_ratio`` is that of LoRA+, for B and magnitudes."""
    ratios = {name: lr_ratio for name in parameters if ".lora_" in name and ".lora_A." not in name}
    if spec.optimizer == "sgd":
        return Optimizer(parameters, SGD(spec.momentum, spec.nesterov, spec.weight_decay), ratios)
    if sharded is not None and spec.optimizer == "adamw_8bit":
        shards: dict[Tensor, Shard] = {parameter: sharded.shards[name] for name, parameter in parameters.items()}
        return Optimizer(parameters, ShardedAdamW8bit(spec.betas, spec.eps, spec.weight_decay, shards, ranks))
    rule = AdamW8bit if spec.optimizer == "adamw_8bit" else AdamW
    return Optimizer(parameters, rule(spec.betas, spec.eps, spec.weight_decay), ratios)


def load_own_base(
    spec: RunSpec,
    inputs: Inputs,
    on_event: OnEvent,
    should_stop: ShouldStop,
    streamed: StreamedBlocks | None = None,
    ranks: Ranks = ALONE,
    drawn_on: torch.device | str = "cpu",
) -> Transformer:
    """The base model, read from its checkpoint or drawn at random."""
    dtype, packed = held_dtype(spec), QUANTIZATIONS.get(spec.model.dtype)
    if inputs.checkpoint is None:
        model = _draw_base(inputs, spec.training.seed, dtype, packed, streamed, drawn_on)
    else:
        quantized = None
        if packed is not None:
            what = spec.model.dtype, inputs.checkpoint, inputs.config, inputs.device
            quantized = QuantizedBase(*what, on_event, should_stop)
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
    inputs: Inputs,
    seed: int,
    dtype: torch.dtype,
    packed: type[PackedWeight] | None,
    streamed: StreamedBlocks | None,
    drawn_on: torch.device | str,
) -> Transformer:
    """A base drawn at random, tensor by tensor: a large model is never held in fp32, nor whole before it is packed."""
    with torch.device("meta"):
        model = Transformer(inputs.config)
    scratch = Scratch()
    for name, drawn in drawn_weights(model, seed, device=drawn_on):
        path, _, attribute = name.rpartition(".")
        module, weight = model.get_submodule(path), drawn.to(inputs.device, dtype)
        if packed is not None and linear_module(name):
            quantized = packed.quantize(weight, scratch)
            if streamed is not None:
                streamed.hold_packed(name, quantized)
            hold_quantized(module, quantized)
            continue
        if streamed is not None and streamed.rows_kept(name) is not None:
            weight = streamed.hold(name, weight)
        setattr(module, attribute, nn.Parameter(weight))
    return model
