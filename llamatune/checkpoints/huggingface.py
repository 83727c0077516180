"""Hugging Face checkpoints: safetensors, in one file or in shards, read and written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llamatune.checkpoints.checkpoint import Checkpoint, refuse_unfit
from llamatune.checkpoints.config_json import EMBEDDING, HEAD, copy_config_json, read_config_json, write_config_json
from llamatune.checkpoints.model_directory import Format
from llamatune.checkpoints.tensor_bytes import tensor_bytes
from llamatune.checkpoints.tensor_locations import INDEX_FILE, SINGLE_FILE, TensorLocation, locate_huggingface
from llamatune.durable_writing import writing
from llamatune.events import OnEvent, ignore_event
from llamatune.formats.manifest import Staging
from llamatune.formats.safetensors import TensorWriter, data_bytes
from llamatune.model.torch_dtypes import DTYPE_NAMES, STORED_NAMES
from llamatune.shapes.config import LlamaConfig
from llamatune.strict_json import dump_json
from llamatune.tokenizers.copied_files import copy_huggingface_tokenizer

_SHARD_BYTES = 5_000_000_000
_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Old checkpoints store the rotary frequencies, which the configuration determines."""


class HuggingFaceCheckpoint(Checkpoint):
    """A directory of ``config.json`` and safetensors."""

    format: Format = "hf"

    def __init__(self, path: Path, config: LlamaConfig, locations: dict[str, TensorLocation]) -> None:
        super().__init__(path, config)
        self.locations = locations

    @classmethod
    def open(cls, path: Path) -> HuggingFaceCheckpoint:
        """Check configuration, headers and index against each other; no tensor is read."""
        locations = locate_huggingface(path)
        config = read_config_json(path, locations)
        ignored = [name for name in locations if _BUFFERS.fullmatch(name)]
        if config.tie_word_embeddings:
            ignored.append(HEAD)
        used = {name: part for name, part in locations.items() if name not in ignored}
        refuse_unfit(
            path,
            dict(config.parameter_shapes()),
            {name: part.shape for name, part in used.items()},
            dtypes={name: part.dtype for name, part in used.items()},
        )
        return cls(path, config, used)

    def parts(self, name: str) -> Sequence[TensorLocation]:
        return (self.locations[name],)

    def tensor(self, name: str, mapped: bool = False) -> torch.Tensor:
        return self._read(self.locations[name], mapped)

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        return self._read_rows(self.locations[name], rows)

    def write_copy(
        self, staging: Staging, tensor_of: Callable[[str], torch.Tensor], dtype: torch.dtype | None, on_event: OnEvent
    ) -> None:
        files = sorted({part.path for part in self.locations.values()})
        shards: dict[Path, list[Declared]] = {file: [] for file in files}
        for name, part in sorted(self.locations.items(), key=lambda item: item[1].entry.begin):
            shards[part.path].append((name, dtype or self.dtype(name), part.shape))
        write_shards(staging, list(shards.values()), tensor_of)
        copy_config_json(self.path, self.config, staging.path, None if dtype is None else DTYPE_NAMES[dtype])
        copy_huggingface_tokenizer(self.path, staging.path, on_event)


Declared = tuple[str, torch.dtype, tuple[int, ...]]
"""A tensor to be written: name, dtype and shape."""


def write_huggingface(
    staging: Staging,
    config: LlamaConfig,
    tensor_of: Callable[[str], torch.Tensor],
    dtype_of: Callable[[str], torch.dtype],
    tokenizer_source: Path | None = None,
    on_event: OnEvent = ignore_event,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a whole model: weights in shards, configuration, tokenizer.

    Args:
        tensor_of: a weight by name (a sharded model gathers it then); each is asked for once, in the order of
            ``config.parameter_shapes()``, and converted to its dtype on the CPU.
        tokenizer_source: a model directory whose tokenizer files are copied.
    """
    write_shards(staging, plan_shards(config, dtype_of, shard_bytes), tensor_of)
    write_config_json(staging.path, config, DTYPE_NAMES[dtype_of(EMBEDDING)])
    if tokenizer_source is not None:
        copy_huggingface_tokenizer(tokenizer_source, staging.path, on_event)


def plan_shards(
    config: LlamaConfig, dtype_of: Callable[[str], torch.dtype], shard_bytes: int = _SHARD_BYTES
) -> list[list[Declared]]:
    """The tensors of each file, in the model's order; no file exceeds ``shard_bytes`` unless a single tensor does."""
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
        declared = [(name, STORED_NAMES[dtype], shape) for name, dtype, shape in shard]
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
