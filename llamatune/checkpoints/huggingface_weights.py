"""Hugging Face checkpoints: safetensors, in one file or in shards, read and written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from llamatune.checkpoints.checkpoint import WIDE, Checkpoint, refuse_unfit, warn_of_wide_weights
from llamatune.checkpoints.config_json import EMBEDDING, HEAD, copy_config_json, read_config_json, write_config_json
from llamatune.checkpoints.huggingface_files import INDEX_FILE, files_of, locate_huggingface, plan_shards, shard_names
from llamatune.checkpoints.model_directory import Format
from llamatune.checkpoints.tensor_bytes import DeclaredTensor, stream_tensors
from llamatune.checkpoints.weights import DtypeOf, WeightOf
from llamatune.events import OnEvent, ignore_event
from llamatune.formats.manifest import Staging
from llamatune.model.torch_dtypes import DTYPE_NAMES
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.strict_json import write_json
from llamatune.tokenizers.copied_files import copy_huggingface_tokenizer


class HuggingFaceCheckpoint(Checkpoint):
    """A directory of ``config.json`` and safetensors, or the PyTorch archives of older models."""

    format: Format = "hf"
    variant: str | None = None

    @classmethod
    def open(cls, path: Path, on_event: OnEvent = ignore_event, variant: str | None = None) -> HuggingFaceCheckpoint:
        """Check configuration, headers and index against each other; no tensor is read."""
        locations = locate_huggingface(path, on_event, variant)
        config = read_config_json(path, locations, on_event)
        shapes = dict(config.parameter_shapes())
        if config.tie_word_embeddings and HEAD in locations:
            head = locations.pop(HEAD)
            locations.setdefault(EMBEDDING, head)  # some keep the head of a tied model in its place
        refuse_unfit(path, shapes, locations)
        warn_of_wide_weights(path, locations.values(), on_event)
        checkpoint = cls(path, config, {name: [locations[name]] for name in shapes})
        checkpoint.variant = variant
        return checkpoint

    def write_copy(self, staging: Staging, weight_of: WeightOf, dtype: torch.dtype | None, on_event: OnEvent) -> None:
        locations = {name: part for name, [part] in self.parts.items()}
        shards = [
            [(name, dtype or self.dtype(name), part.shape) for name, part in file] for file in files_of(locations)
        ]
        _write_shards(staging, shards, weight_of)
        if dtype is None and (self.variant is not None or any(part.dtype == WIDE for part in locations.values())):
            dtype = self.dtype(EMBEDDING)  # which is another than the configuration's
        copy_config_json(self.path, self.config, staging.path, None if dtype is None else DTYPE_NAMES[dtype])
        copy_huggingface_tokenizer(self.path, staging.path, on_event)


def write_huggingface(
    staging: Staging,
    config: LlamaConfig,
    weight_of: WeightOf,
    dtype_of: DtypeOf,
    source: Path,
    on_event: OnEvent,
    shards: int | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Write a whole model: weights in shards, configuration, tokenizer.

    Args:
        weight_of: each weight is asked for once (a sharded model gathers it then), in the order of
            ``config.parameter_shapes()``, and converted to its dtype on the CPU.
        source: a model directory whose tokenizer files and settings of generation are copied.
        shards: so many files; None: none is larger than ``shard_bytes``, unless a single tensor is.
    """
    _write_shards(staging, _plan_shards(config, dtype_of, shards, shard_bytes), weight_of)
    write_config_json(staging.path, config, DTYPE_NAMES[dtype_of(EMBEDDING)], source)
    copy_huggingface_tokenizer(source, staging.path, on_event)


def write_changed_copy(
    staging: Staging, config: LlamaConfig, weight_of: WeightOf, dtype_of: DtypeOf, source: Path, on_event: OnEvent
) -> None:
    """Write ``source``, a directory of this format, again as a model of another vocabulary, tie or set of biases."""
    _write_shards(staging, _plan_shards(config, dtype_of), weight_of)
    copy_config_json(source, config, staging.path, DTYPE_NAMES[dtype_of(EMBEDDING)])
    copy_huggingface_tokenizer(source, staging.path, on_event)


def _plan_shards(
    config: LlamaConfig, dtype_of: DtypeOf, count: int | None = None, shard_bytes: int | None = None
) -> list[list[DeclaredTensor]]:
    """The tensors of each file, in the model's order."""
    declared = {name: (name, dtype_of(name), shape) for name, shape in config.parameter_shapes()}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, dtype, shape in declared.values()}
    return [[declared[name] for name in file] for file in plan_shards(sizes, count, shard_bytes)]


def _write_shards(staging: Staging, shards: Sequence[Sequence[DeclaredTensor]], weight_of: WeightOf) -> None:
    """``model.safetensors``, or numbered shards with their index; one tensor at a time is in memory."""
    weight_map: dict[str, str] = {}
    for file_name, shard in zip(shard_names(len(shards)), shards, strict=True):
        stream_tensors(staging, file_name, shard, (weight_of(name) for name, _, _ in shard))
        weight_map |= {name: file_name for name, _, _ in shard}
    if len(shards) == 1:
        return
    total = sum(math.prod(shape) * dtype.itemsize for shard in shards for _, dtype, shape in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(staging.path / INDEX_FILE, index)
