"""Opens a model source: a base and its adapter, checked against each other before any weight is read."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llamatune import __version__
from llamatune.checkpoints.adapter import Adapter, check_adapter
from llamatune.checkpoints.adapter_sum import load_adapters, template_holder, weighted_sum
from llamatune.checkpoints.broken_weights import with_broken_tensor
from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.checkpoints.quantized_base import QuantizedBase
from llamatune.command_options.generation import Merge
from llamatune.command_options.inference import ModelSource, Placement
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.segments import Segments
from llamatune.data.template_choice import load_template, stored_template
from llamatune.data.templates import Template
from llamatune.devices import choose_device, lacks_bf16
from llamatune.errors import NumericsError
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event
from llamatune.formats.manifest import find_manifest
from llamatune.inference.merging_in_memory import merge_in_memory
from llamatune.inference.prompt_encoding import encode_prompts
from llamatune.model.adapters.adapter_switch import AdapterSwitch
from llamatune.model.adapters.apply import apply_adapter, load_adapter_tensors, switch_of
from llamatune.model.kernels.choice import chosen_kernels
from llamatune.model.packed_weight import PackedWeight
from llamatune.model.quantization import QUANTIZATIONS
from llamatune.model.streamed_blocks import stream_blocks
from llamatune.model.torch_dtypes import DTYPE_NAMES, TORCH_DTYPES
from llamatune.model.transformer import Transformer
from llamatune.out_of_memory import memory_faults
from llamatune.ranks import ALONE, Ranks
from llamatune.shapes.dtypes import QUANTIZED_DTYPES
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shared_work import refuse_differences
from llamatune.threads import suitable_threads
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.tokenizer import Tokenizer, check_vocabulary


@dataclass(frozen=True)
class LoadedModels:
    """The model, with its adapter, as ``""``; the base as ``base_`` where the two are compared. Ready to compute.

    The keys are the prefixes of result names. The two models share the frozen weights. ``idle``: what a rank that has
    nothing to compute does while the others compute one forward pass; None: nothing. ``switch``: makes the model with
    the adapter compute the base too; None: they are not compared, or the base has weights of its own.
    """

    by_prefix: dict[str, Transformer]
    idle: Callable[[], None] | None
    switch: AdapterSwitch | None = None


@dataclass(frozen=True)
class OpenedModel:
    """A model directory and the adapter that belongs to it; make it with ``open_model``.

    ``adapter`` is the weighted sum of ``adapters``; ``merge`` says whether it is merged into the weights. ``dtype`` is
    what the weights will be held in, None: as they are stored. ``quantized`` names what those of the blocks are
    quantised to; None: they are not.
    """

    path: Path
    checkpoint: Checkpoint
    adapter: Adapter | None
    compare: bool
    dtype: torch.dtype | None
    device: torch.device
    placement: Placement = "device"
    ranks: Ranks = ALONE
    quantized: str | None = None
    adapters: tuple[Adapter, ...] = ()
    merge: Merge = "off"

    @property
    def dtype_name(self) -> str:
        """``bfloat16`` or ``nf4``; of a checkpoint that mixes dtypes, that of the embedding, which it computes in."""
        return self.quantized or DTYPE_NAMES[self.dtype or _stored_dtype(self.checkpoint)]

    def memory_advice(self, *others: str) -> str:
        """What to change when memory runs out: ``others``, or to hold the weights in fewer bits than they are."""
        in_fewer_bits = {
            "float32": "use a 16-bit --dtype",
            "bfloat16": "use --dtype float8 or nf4",
            "float16": "use --dtype float8 or nf4",
            "float8": "use --dtype nf4",
            "int8": "use --dtype nf4",
        }
        return ", or ".join([*others, *filter(None, [in_fewer_bits.get(self.dtype_name)])])

    @functools.cached_property
    def _changed(self) -> Checkpoint:
        """The base with what the adapter replaces in it."""
        return self.checkpoint if self.adapter is None else self.adapter.on(self.checkpoint)

    @property
    def shares_base(self) -> bool:
        """Whether the base can be computed beside the model with the adapter without further weights."""
        return self.adapter is not None and self._changed is self.checkpoint

    @property
    def merges(self) -> bool:
        """Whether the model's weights hold the adapter's update, without a layer beside them.

        With ``auto`` that is on a GPU, which is as slow with many small kernels as with few; a CPU gains too little.
        """
        has_own = self.adapter is not None and not self.compare  # weights, which no other model computes with
        may = has_own and self.quantized is None and self.placement == "device"
        return may and (self.merge == "on" or (self.merge == "auto" and self.device.type == "cuda"))

    @property
    def _may_join(self) -> bool:
        """Whether products of the blocks can be joined; merged layers have weights of their own."""
        return self.device.type == "cpu" and self.placement == "device" and not self.merges

    @property
    def config(self) -> LlamaConfig:
        """The model's with the adapter, which may have a larger vocabulary than the base."""
        return self._changed.config

    @property
    def configs(self) -> set[LlamaConfig]:
        """Those of all models that are loaded."""
        return {self.config, self.checkpoint.config} if self.compare else {self.config}

    @property
    def tokenizer_path(self) -> Path:
        """The directory whose tokenizer is used."""
        return (self.adapter and self.adapter.tokenizer_path) or self.path

    def tokenizer(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.tokenizer_path)
        check_vocabulary(tokenizer, self.config.vocab_size, self.tokenizer_path)
        return tokenizer

    def template(
        self, chosen: str | Template | ChatTemplate | None, tokenizer: Tokenizer, on_event: OnEvent
    ) -> Template | ChatTemplate | None:
        """The template of a name or file; for None the one stored with the adapter or merged model, if any."""
        if isinstance(chosen, str):
            return None if chosen == "none" else load_template(chosen, tokenizer, on_event)
        if chosen is not None:
            return chosen
        holder = template_holder(self.adapters) if self.adapters else find_manifest(self.path)
        if holder is None or holder.template is None:
            return None
        return stored_template(holder.template, holder.path)

    def encode(
        self, tokenizer: Tokenizer, prompts: Sequence[Segments], new_tokens: int, on_event: OnEvent
    ) -> list[list[int]]:
        """Ids of each prompt; a warning if they, or so many new tokens after them, exceed the context.

        ``DataError`` for a prompt without a token.
        """
        configs = [self.config, *self.configs]
        return encode_prompts(tokenizer, prompts, configs, self.path, new_tokens, on_event)

    @contextlib.contextmanager
    def computing(self, tokens: float, advice: str, on_event: OnEvent) -> Iterator[None]:
        """For all that computes: threads for passes of so many tokens, the device's kernels, faults with ``advice``.

        A ``NumericsError`` names the tensor that explains it.
        """
        kernels = chosen_kernels("auto", self.device, on_event)
        with memory_faults(self.device, advice), suitable_threads(self.checkpoint.config, tokens), kernels:
            try:
                yield
            except NumericsError as fault:
                raise with_broken_tensor(fault, self.checkpoint, self.adapters) from None

    def load(self, on_event: OnEvent, should_stop: ShouldStop, generates: bool = False) -> LoadedModels:
        """Read the weights; to generate, with joined products where those are quicker.

        A loss is computed without them, to the same bits wherever the blocks lie.
        """
        joined = generates and self._may_join
        model, idle = self._load(self._changed, on_event, should_stop, joined)
        models = {"": model if self.adapter is None else _with_adapter(model, self.adapter)}
        if not self.compare:
            del model  # its weights are freed as they are merged
            if self.merges:
                merge_in_memory(models[""], self.merge == "on", self.adapters[0].path, on_event, should_stop)
            return LoadedModels(models, idle)
        if self.shares_base:
            return LoadedModels({**models, "base_": model}, idle, switch_of(models[""]))
        model, _ = self._load(self.checkpoint, on_event, should_stop, joined)
        return LoadedModels({**models, "base_": model}, idle)

    def _load(
        self, checkpoint: Checkpoint, on_event: OnEvent, should_stop: ShouldStop, joined: bool
    ) -> tuple[Transformer, Callable[[], None] | None]:
        """A model without the low-rank updates of its blocks, and what a rank does that has nothing to compute."""
        held, dtype = self.dtype or _stored_dtype(checkpoint), self.dtype
        config, packed, quantized = checkpoint.config, None, None
        if self.quantized is not None:
            packed = QUANTIZATIONS[self.quantized]
            what = self.quantized, checkpoint, config, self.device
            quantized = QuantizedBase(*what, on_event, should_stop)
        streamed = stream_blocks(self.placement, config, held, packed, self.device, self.ranks)
        if streamed is not None:
            dtype = held  # of all blocks, which are alike
        model = load_model(
            checkpoint,
            dtype,
            self.device,
            on_event=on_event,
            should_stop=should_stop,
            quantized=quantized,
            streamed=streamed,
            joined=joined,
        ).eval()
        if streamed is not None:
            streamed.attach(model)
        return model, None if streamed is None else functools.partial(streamed.idle, backward=False)


def open_model(
    source: ModelSource, on_event: OnEvent = ignore_event, ranks: Ranks = ALONE, merge: Merge = "off"
) -> OpenedModel:
    """Open a model directory and, if there is one, the adapter. Several ranks must have the same, and one request.

    ``merge``: whether the adapter is merged into the weights when they are loaded.

    Raises:
        EnvironmentFault: the device is absent, or torch has no kernels for it; the ranks differ.
        CheckpointError: model or adapter cannot be used or do not belong together.
    """
    device = choose_device(source.device, on_event, None if ranks.size == 1 else ranks.local_rank)
    checkpoint = open_checkpoint(source.model, on_event, source.variant)
    adapters = load_adapters(source.adapters)
    for adapter in adapters:
        check_adapter(adapter, checkpoint.config, fingerprint(checkpoint), source.force_base, on_event)
    if ranks.size > 1:
        own = {field.name: repr(getattr(source, field.name)) for field in dataclasses.fields(source)}
        own |= {"torch": torch.__version__, "llamatune": __version__, "content of --model": fingerprint(checkpoint)}
        refuse_differences({**own, "content of --adapter": [adapter.digest for adapter in adapters]}, ranks)
    dtype, quantized = TORCH_DTYPES.get(source.dtype), source.dtype if source.dtype in QUANTIZED_DTYPES else None
    if quantized is not None:
        dtype = torch.float16 if lacks_bf16(device) else torch.bfloat16
    if dtype is None and device.type == "cpu" and _stored_dtype(checkpoint) == torch.float16:
        on_event(Notice("computing in fp32, since fp16 is very slow on a CPU; --dtype bfloat16 takes half the memory"))
        dtype = torch.float32
    if (dtype or _stored_dtype(checkpoint)) == torch.bfloat16 and lacks_bf16(device):
        name = torch.cuda.get_device_name(device)
        on_event(Notice(f"{name} has no bf16 and is slow with it; --dtype float16 is quick"))
    where = device, source.placement, ranks
    summed = weighted_sum(adapters, source.adapter_weights) if adapters else None
    how = source.compare, dtype, *where, quantized
    return OpenedModel(source.model, checkpoint, summed, *how, tuple(adapters), merge)


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return checkpoint.dtype("model.embed_tokens.weight")


def _with_adapter(base: Transformer, adapter: Adapter) -> Transformer:
    """The base with an adapter put on: a new model around the same frozen tensors."""
    if not adapter.tensors:
        return base
    packed = (module for module in base.modules() if isinstance(module, PackedWeight))
    tuned = copy.deepcopy(base, {id(shared): shared for shared in itertools.chain(base.parameters(), packed)})
    apply_adapter(tuned, dataclasses.replace(adapter.config, dropout=0.0), seed=None)
    load_adapter_tensors(tuned, adapter.tensors)
    return tuned.requires_grad_(False).eval()
