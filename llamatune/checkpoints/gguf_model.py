"""A model in one GGUF file, read as a checkpoint and written; the vocabulary is ``tokenizers.gguf_vocabulary``'s."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from llamatune.checkpoints.checkpoint import WIDE, Checkpoint, read_into, refuse_unfit
from llamatune.checkpoints.config_json import EMBEDDING
from llamatune.checkpoints.gguf_blocks import Q8_0, Q8_0_VALUES, dequantized, quantized
from llamatune.checkpoints.gguf_config import (
    ROPE_FACTORS,
    config_metadata,
    gguf_name,
    is_interleaved,
    read_gguf_config,
    rope_factors,
)
from llamatune.checkpoints.model_directory import Format
from llamatune.checkpoints.row_order import interleaved_row, is_rotated, rows_apart, rows_interleaved
from llamatune.checkpoints.tensor_bytes import tensor_bytes
from llamatune.checkpoints.weights import Weight, WeightOf, portions_of
from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.formats.gguf import BLOCKS, SUFFIX, Metadata, read_gguf, write_gguf
from llamatune.formats.manifest import Staging
from llamatune.formats.safetensors import TensorLocation
from llamatune.model.torch_dtypes import STORED_NAMES, STORED_WEIGHTS
from llamatune.safe_reading import open_regular, read_faults
from llamatune.shapes.llama_config import LlamaConfig

MODEL_FILE = f"model{SUFFIX}"
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
"""``general.file_type``, which llama.cpp shows; it reads the type of each tensor."""
_QUANTIZATION_VERSION = 2
_OF_ONE_FILE = ("architecture", "type", "file_type", "quantization_version", "alignment")


class GgufCheckpoint(Checkpoint):
    """A GGUF file of one model. Quantised tensors are read as fp32, the vectors beside 16-bit matrices as those are.

    llama.cpp stores every vector in fp32. One whose values the matrices' dtype holds exactly was stored in it before.
    """

    format: Format = "gguf"
    entries: Metadata

    @classmethod
    def open(cls, path: Path, on_event: OnEvent = ignore_event) -> GgufCheckpoint:
        """Check header and configuration against each other; of tensors only the factors of rope are read.

        Raises:
            CheckpointError: no sound GGUF file, an architecture that is not supported, tensors that do not fit.
        """
        header = read_gguf(path)
        locations = dict(header.tensors)
        factors = locations.pop(ROPE_FACTORS, None)
        shapes = {name: part.shape for name, part in locations.items()}
        config = read_gguf_config(header.metadata, shapes, None if factors is None else _floats(factors), path)
        names = {name: gguf_name(name) for name, _ in config.parameter_shapes()}
        expected = {names[name]: shape for name, shape in config.parameter_shapes()}
        whole = {n: dataclasses.replace(p, dtype="F32") if p.dtype in BLOCKS else p for n, p in locations.items()}
        refuse_unfit(path, expected, whole)
        checkpoint = cls(path, config, {name: [locations[stored]] for name, stored in names.items()})
        checkpoint.entries = header.entries
        quantised = sorted({part.dtype for part in locations.values()} - set(_FILE_TYPES) - {WIDE} | {Q8_0})
        if any(part.dtype in quantised for part in locations.values()):
            kinds = ", ".join(sorted({part.dtype for part in locations.values() if part.dtype in quantised}))
            on_event(Notice(f"{path}: weights in {kinds} are read as fp32, which holds their values exactly"))
        return checkpoint

    def dtype(self, name: str) -> torch.dtype:
        matrices = super().dtype(EMBEDDING)
        if len(self.shapes[name]) > 1 or super().dtype(name) != torch.float32 or matrices == torch.float32:
            return super().dtype(name)
        vector = self._read(self.parts[name][0])
        return matrices if torch.equal(vector.to(matrices).float(), vector) else torch.float32

    def is_rotated(self, name: str) -> bool:
        return is_interleaved(self.config) and is_rotated(name)

    def tensor(self, name: str, mapped: bool = False) -> torch.Tensor:
        part = self.parts[name][0]
        if not _is_quantized(part):
            W = self._read(part, mapped).to(self.dtype(name))
            return rows_apart(W, self.config.head_dim) if self.is_rotated(name) else W
        W, read = torch.empty(part.shape), self.row_reader(name)
        for rows in self.row_portions(name):
            W[rows] = read(rows)
        return W

    def row_reader(self, name: str) -> Callable[[slice], torch.Tensor]:
        part, dtype, plain = self.parts[name][0], self.dtype(name), super().row_reader(name)

        def read(rows: slice) -> torch.Tensor:
            W = self._dequantized(name, rows.start, rows.stop) if _is_quantized(part) else plain(rows).to(dtype)
            return rows_apart(W, self.config.head_dim) if self.is_rotated(name) else W

        return read

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        if self.is_rotated(name):
            rows = [interleaved_row(row, self.config.head_dim) for row in rows]
        part = self.parts[name][0]
        if not _is_quantized(part):
            return self._read_rows(part, rows).to(self.dtype(name))
        return torch.cat([self._dequantized(name, row, row + 1) for row in rows])

    def write_copy(self, staging: Staging, weight_of: WeightOf, dtype: torch.dtype | None, on_event: OnEvent) -> None:
        types = {n: stored_type(shape, dtype or self.dtype(n), quantize=False) for n, shape in self.shapes.items()}
        vocabulary = self.kept_entries()
        with writing(staging.path / MODEL_FILE) as file:
            digest = write_gguf_model(file, self.config, weight_of, types, vocabulary, self.path.stem)
        staging.digests[MODEL_FILE] = digest

    def kept_entries(self) -> dict[str, tuple[str, Any]]:
        """What another file of the same model says too: the tokenizer, name, licence and origin."""
        kept = {key: value for key, value in self.entries.items() if key.startswith(("tokenizer.", "general."))}
        return {key: value for key, value in kept.items() if key.removeprefix("general.") not in _OF_ONE_FILE}

    def _dequantized(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows in the order of the file, fp32."""
        part = self.parts[name][0]
        values, size = BLOCKS[part.dtype]
        row_bytes = part.shape[-1] // values * size
        stored = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        read_into(self.path, part.begin + start * row_bytes, stored)
        return dequantized(stored.view(-1, size), part.dtype, gguf_name(name)).view(-1, *part.shape[1:])


def _is_quantized(part: TensorLocation) -> bool:
    return part.dtype not in STORED_WEIGHTS and part.dtype != WIDE


def _floats(part: TensorLocation) -> list[float]:
    count = (part.end - part.begin) // 4
    if part.dtype != "F32" or len(part.shape) != 1 or count > 1 << 10:
        raise CheckpointError(f"{ROPE_FACTORS} is malformed", part.path, "fetch it again")
    with open_regular(part.path) as file, read_faults(part.path):
        file.seek(part.begin)
        return list(struct.unpack(f"<{count}f", file.read(4 * count)))


def stored_type(shape: tuple[int, ...], dtype: torch.dtype, quantize: bool) -> str:
    """The type of a tensor in the file: vectors are in fp32, rows that blocks of 32 do not fill in fp16, as there."""
    if len(shape) == 1:
        return "F32"
    if not quantize:
        return STORED_NAMES[dtype]
    return Q8_0 if shape[-1] % Q8_0_VALUES == 0 else "F16"


def write_gguf_model(
    file: BinaryIO,
    config: LlamaConfig,
    weight_of: WeightOf,
    type_of: Mapping[str, str],
    vocabulary: Metadata,
    name: str,
) -> str:
    """Stream a whole model; the file's SHA-256 is returned.

    Args:
        weight_of: each weight is asked for once, in the order of ``config.parameter_shapes()``.
        type_of: the type of each, by Hugging Face's name.
        vocabulary: the keys of the tokenizer.
        name: of the model, for display.
    """
    facts = config_metadata(config)
    general = {
        "general.architecture": facts.pop("general.architecture"),
        "general.type": ("str", "model"),
        "general.name": ("str", name),
        "general.file_type": ("u32", _FILE_TYPES[type_of[EMBEDDING]]),
        "general.quantization_version": ("u32", _QUANTIZATION_VERSION),
    }
    factors, permuted = rope_factors(config), is_interleaved(config)
    declared = [(gguf_name(name), type_of[name], shape) for name, shape in config.parameter_shapes()]

    def data() -> Iterator[Iterator[memoryview]]:
        if factors is not None:
            yield _stored(torch.tensor(factors), "F32")
        for name, _ in config.parameter_shapes():
            yield _stored(weight_of(name), type_of[name], config.head_dim if permuted and is_rotated(name) else None)

    if factors is not None:
        declared.insert(0, (ROPE_FACTORS, "F32", (len(factors),)))
    return write_gguf(file, {**general, **facts, **vocabulary}, declared, data())


def _stored(weight: Weight, type_name: str, head_dim: int | None = None) -> Iterator[memoryview]:
    """The bytes of a weight, some rows at a time; ``head_dim`` where its rows are interleaved."""
    for portion in portions_of(weight, STORED_WEIGHTS.get(type_name, torch.float32)):
        rows = rows_interleaved(portion, head_dim) if head_dim else portion
        stored = (quantized(rows) if type_name == Q8_0 else rows).contiguous()  # outlives the view of its bytes
        yield tensor_bytes(stored)
