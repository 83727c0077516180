"""A base in NF4, quantised while it is read, or read from a cache on disk of quantised weights.

The cache is a directory of products, one for each base: ``nf4-<fingerprint>-<layers>/nf4.safetensors`` holds the
tensors of ``nf4.storage`` as ``<name>.<tensor>``. A product that does not match its manifest is made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamatune.checkpoints.checkpoint import Checkpoint, read_into
from llamatune.checkpoints.tensor_bytes import DeclaredTensor, is_finite, stream_tensors
from llamatune.errors import CheckpointError, LlamatuneError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop
from llamatune.formats.manifest import build_directory, finished_product, has_manifest, verify_product
from llamatune.formats.safetensors import TensorLocation, read_header
from llamatune.model.nf4 import NF4Weight, Scratch, quantize_nf4, storage
from llamatune.model.torch_dtypes import STORED_NAMES
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig

_FILE, _KIND = "nf4.safetensors", "nf4-weights"
SCHEMA = 1


@dataclass
class QuantizedBase:
    """Gives the NF4 form of each linear layer of the blocks, on ``device``, and None for every other tensor.

    Peak memory is that of the tensors given out, and of one tensor as stored and a few megabytes.
    """

    checkpoint: Checkpoint
    config: LlamaConfig
    device: torch.device
    on_event: OnEvent
    should_stop: ShouldStop

    def __post_init__(self) -> None:
        shapes = self.config.parameter_shapes()
        self._matrices = {name: shape for name, shape in shapes if name.split(".")[-2] in LINEAR_MODULES}
        self._scratch = Scratch()
        self._cached: dict[str, TensorLocation] | None = None

    def __call__(self, name: str) -> NF4Weight | None:
        """The matrix ``name`` of a checkpoint, quantised anew or from the cache."""
        if name not in self._matrices:
            return None
        if self._cached is None:
            return self._quantize(name)
        tensors = {}
        for key, (dtype, shape) in storage(self._matrices[name]).items():
            location = self._cached[f"{name}.{key}"]
            tensor = torch.empty(shape, dtype=dtype)
            read_into(location.path, location.begin, tensor)
            tensors[key] = tensor.to(self.device)
        return NF4Weight(self._matrices[name], tensors, self._scratch)

    def _quantize(self, name: str) -> NF4Weight:
        weight = self.checkpoint.tensor(name, mapped=True).to(self.device)
        if not is_finite(weight):
            raise CheckpointError(
                f"{name} holds NaN or infinity, which nf4 has no code for", self.checkpoint.path, "use bfloat16"
            )
        return quantize_nf4(weight, self._scratch)

    def use_cache(self, directory: Path, base_fingerprint: str) -> None:
        """Read from ``directory`` from now on; a missing or damaged cache is made first."""
        path = directory / f"nf4-{base_fingerprint.removeprefix('sha256:')[:16]}-{self.config.num_hidden_layers}"
        inputs = {"base": base_fingerprint, "layers": self.config.num_hidden_layers, "schema": SCHEMA}
        declared = [
            (f"{name}.{key}", dtype, tensor_shape)
            for name, shape in self._matrices.items()
            for key, (dtype, tensor_shape) in storage(shape).items()
        ]
        ours = has_manifest(path)  # any other directory there is refused
        if not ours or not self._usable(path, inputs, declared):
            with build_directory(path, _KIND, inputs, overwrite=ours) as staging:
                stream_tensors(staging, _FILE, declared, self._quantized_tensors(path))
        self._cached = read_header(path / _FILE)[0]

    def _usable(self, path: Path, inputs: dict[str, Any], declared: list[DeclaredTensor]) -> bool:
        try:
            if finished_product(path, _KIND, inputs) is None:
                raise CheckpointError("incomplete, or not of this base", path)
            verify_product(path)
            stored = {(name, part.dtype, part.shape) for name, part in read_header(path / _FILE)[0].items()}
            if stored != {(name, STORED_NAMES[dtype], shape) for name, dtype, shape in declared}:
                raise CheckpointError("not the tensors of this base", path)
        except LlamatuneError as fault:
            self.on_event(Notice(f"quantised weights are made again: {fault}", "warning"))
            return False
        return True

    def _quantized_tensors(self, path: Path) -> Iterator[torch.Tensor]:
        for done, name in enumerate(self._matrices, 1):
            if self.should_stop():
                raise Stopped("stopped while quantising the model", path, "run the same command again")
            packed = self._quantize(name)
            yield from (getattr(packed, key) for key in storage(packed.shape))
            self.on_event(Progress("quantising", done, len(self._matrices)))
