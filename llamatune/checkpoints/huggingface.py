"""Hugging Face checkpoints: safetensors, in one file or in shards, read and written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llamatune.checkpoints.checkpoint import STORED_DTYPES, Checkpoint, refuse_unfit
from llamatune.checkpoints.config_files import HF_HEAD, Format, huggingface_config, rope_facts
from llamatune.checkpoints.stored import INDEX_FILE, SINGLE_FILE, Stored, stored_huggingface
from llamatune.checkpoints.tensors import tensor_bytes
from llamatune.checkpoints.tokenizer_files import copy_file, copy_huggingface_tokenizer
from llamatune.durable_writing import writing
from llamatune.events import OnEvent, ignore_event
from llamatune.formats.manifest import Staging
from llamatune.formats.safetensors import TensorWriter, data_bytes
from llamatune.shapes.config import LlamaConfig
from llamatune.strict_json import dump_json, read_json

_SHARD_BYTES = 5_000_000_000
_DTYPE_KEYS = ("dtype", "torch_dtype")
"""transformers 5 writes the first, transformers 4 and others read the second."""
_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Old checkpoints store the rotary frequencies, which follow from the configuration."""


class HuggingFaceCheckpoint(Checkpoint):
    """A directory of ``config.json`` and safetensors."""

    format: Format = "hf"

    def __init__(self, path: Path, config: LlamaConfig, stored: dict[str, Stored]) -> None:
        super().__init__(path, config)
        self.stored = stored

    @classmethod
    def open(cls, path: Path) -> HuggingFaceCheckpoint:
        """Check configuration, headers and index against each other; no tensor is read."""
        stored = stored_huggingface(path)
        config = huggingface_config(path, stored)
        ignored = [name for name in stored if _BUFFERS.fullmatch(name)]
        if config.tie_word_embeddings:
            ignored.append(HF_HEAD)
        used = {name: part for name, part in stored.items() if name not in ignored}
        refuse_unfit(
            path,
            dict(config.parameter_shapes()),
            {name: part.shape for name, part in used.items()},
            dtypes={name: part.dtype for name, part in used.items()},
        )
        return cls(path, config, used)

    def parts(self, name: str) -> Sequence[Stored]:
        return (self.stored[name],)

    def tensor(self, name: str, mapped: bool = False) -> torch.Tensor:
        return self._read(self.stored[name], mapped)

    def layout(self) -> list[list[str]]:
        """The tensors of each file, files by name and tensors as they lie in them."""
        files = sorted({part.path for part in self.stored.values()})
        by_position = sorted(self.stored, key=lambda name: self.stored[name].entry.begin)
        return [[name for name in by_position if self.stored[name].path == file] for file in files]

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        return self._read_rows(self.stored[name], rows)


Declared = tuple[str, torch.dtype, tuple[int, ...]]
"""A tensor to come: name, dtype and shape."""


def write_huggingface(
    staging: Staging,
    config: LlamaConfig,
    tensors: Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor],
    dtype: torch.dtype,
    tokenizer_source: Path | None = None,
    shard_bytes: int = _SHARD_BYTES,
    on_event: OnEvent = ignore_event,
) -> None:
    """Write a whole model: weights in shards, configuration, tokenizer.

    Args:
        tensors: by name, or a function that gives one (a sharded model gathers it then); each is asked for once, in
            the order of ``config.parameter_shapes()``, and converted to ``dtype`` on the CPU.
        tokenizer_source: a model directory whose tokenizer files are copied.
    """
    shards = plan_shards(config, lambda name: dtype, shard_bytes)
    write_shards(staging, shards, tensors if callable(tensors) else tensors.__getitem__)
    write_config_files(staging.path, config, dtype)
    if tokenizer_source is not None:
        copy_huggingface_tokenizer(tokenizer_source, staging.path, on_event)


def plan_shards(
    config: LlamaConfig, dtype_of: Callable[[str], torch.dtype], shard_bytes: int = _SHARD_BYTES
) -> list[list[Declared]]:
    """Which tensors go into which file, in the model's own order, none larger than ``shard_bytes`` unless one is."""
    shards: list[list[Declared]] = [[]]
    size = 0
    for name, shape in config.parameter_shapes():
        tensor_size = math.prod(shape) * dtype_of(name).itemsize
        if shards[-1] and size + tensor_size > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, dtype_of(name), shape))
        size += tensor_size
    return shards


def write_shards(
    staging: Staging, shards: Sequence[Sequence[Declared]], tensor_of: Callable[[str], torch.Tensor]
) -> None:
    """``model.safetensors``, or numbered shards with their index; one tensor at a time is in memory."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
        declared = [(name, STORED_DTYPES[dtype], shape) for name, dtype, shape in shard]
        with writing(staging.path / file_name, data_bytes(declared)) as file:
            writer = TensorWriter(file, declared, {"format": "pt"})
            for name, dtype, shape in shard:
                tensor = tensor_of(name).detach().to("cpu", dtype).contiguous()
                assert tuple(tensor.shape) == shape, f"{name} has the shape {tuple(tensor.shape)}"
                writer.write(tensor_bytes(tensor))
                weight_map[name] = file_name
                total += tensor.nbytes
            staging.digests[file_name] = writer.finish()
    if len(shards) > 1:
        with writing(staging.path / INDEX_FILE) as file:
            file.write(dump_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}))


def write_config_files(directory: Path, config: LlamaConfig, dtype: torch.dtype) -> None:
    """``config.json`` in the spelling that transformers 4 and 5 both read, and ``generation_config.json``."""
    ends = config.eos_token_ids
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else list(ends)}
    facts: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        **tokens,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        **rope_facts(config.rope_theta),
        "tie_word_embeddings": config.tie_word_embeddings,
        **dict.fromkeys(_DTYPE_KEYS, str(dtype).removeprefix("torch.")),
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    with writing(directory / "config.json") as file:
        file.write(dump_json(facts))
    with writing(directory / "generation_config.json") as file:
        file.write(dump_json(tokens))


def copy_config_files(source: HuggingFaceCheckpoint, directory: Path, dtype: torch.dtype | None) -> None:
    """The base's own configuration, with every spelling of what readers look for under different names.

    ``dtype``: what the weights are cast to; None: as the base says.
    """
    facts = read_json(source.path / "config.json")
    stated = _stated(facts)
    rope = rope_facts(source.config.rope_theta)
    rope["rope_parameters"] |= _stated(stated.pop("rope_parameters", {}))
    dtype_name = stated.get("dtype", stated.get("torch_dtype"))
    names = {} if dtype_name is None else dict.fromkeys(_DTYPE_KEYS, dtype_name)
    changed = {**facts, **rope, **names, **stated}
    if dtype is not None:
        changed |= dict.fromkeys(_DTYPE_KEYS, str(dtype).removeprefix("torch."))
    changed["tie_word_embeddings"] = source.config.tie_word_embeddings  # mlx-lm takes a missing flag for true
    if changed == facts:
        copy_file(source.path / "config.json", directory)
    else:
        with writing(directory / "config.json") as file:
            file.write(dump_json(changed))
    if (source.path / "generation_config.json").exists():
        copy_file(source.path / "generation_config.json", directory)


def _stated(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None}
