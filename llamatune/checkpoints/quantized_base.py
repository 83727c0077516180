"""A quantised base: quantised while it is read, or read from a cache on disk of quantised weights.

The cache is a directory of products, one for each base and kind: ``nf4-<fingerprint>-<layers>/nf4.safetensors`` holds
the tensors of ``PackedWeight.storage`` as ``<name>.<tensor>``. A product that does not match its manifest is made
again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamatune.checkpoints.checkpoint import Checkpoint, read_into
from llamatune.checkpoints.tensor_bytes import DeclaredTensor, is_finite, stream_tensors
from llamatune.errors import CheckpointError, EnvironmentFault, LlamatuneError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop
from llamatune.formats.manifest import build_directory, finished_product, has_manifest, verify_product
from llamatune.formats.safetensors import TensorLocation, read_header
from llamatune.model.packed_weight import PackedWeight, Scratch
from llamatune.model.quantization import QUANTIZATIONS
from llamatune.model.torch_dtypes import STORED_NAMES
from llamatune.shapes.llama_config import LlamaConfig, linear_module

SCHEMA = 1


@dataclass
class QuantizedBase:
    """Gives the quantised form of each linear layer of the blocks, on ``device``, and None for every other tensor.

    Peak memory is that of the tensors given out, and of one tensor as stored and a few megabytes.
    """

    dtype: str
    checkpoint: Checkpoint
    config: LlamaConfig
    device: torch.device
    on_event: OnEvent
    should_stop: ShouldStop

    def __post_init__(self) -> None:
        shapes = self.config.parameter_shapes()
        self._matrices = {name: shape for name, shape in shapes if linear_module(name)}
        self._kind, self._scratch = QUANTIZATIONS[self.dtype], Scratch()
        self._file = f"{self.dtype}.safetensors"
        self._cached: dict[str, TensorLocation] | None = None

    def __call__(self, name: str) -> PackedWeight | None:
        """The matrix ``name`` of a checkpoint, quantised anew or from the cache."""
        if name not in self._matrices:
            return None
        if self._cached is None:
            return self._quantize(name)
        tensors = {}
        for key, (dtype, shape) in self._kind.storage(self._matrices[name]).items():
            location = self._cached[f"{name}.{key}"]
            tensor = torch.empty(shape, dtype=dtype)
            read_into(location.path, location.begin, tensor)
            tensors[key] = tensor.to(self.device)
        return self._kind(self._matrices[name], tensors, self._scratch)

    def _quantize(self, name: str) -> PackedWeight:
        # On a CPU pages of a mapped file would count as this process's memory long after they were read.
        weight = self.checkpoint.tensor(name, mapped=self.device.type != "cpu").to(self.device)
        if not is_finite(weight):
            what = f"{name} holds NaN or infinity, which {self.dtype} has no code for"
            raise CheckpointError(what, self.checkpoint.path, "use bfloat16")
        return self._kind.quantize(weight, self._scratch)

    def use_cache(self, directory: Path, base_fingerprint: str) -> None:
        """Read from ``directory`` from now on; a missing or damaged cache is made first."""
        base = base_fingerprint.removeprefix("sha256:")[:16]
        path = directory / f"{self.dtype}-{base}-{self.config.num_hidden_layers}"
        inputs = {"base": base_fingerprint, "layers": self.config.num_hidden_layers, "schema": SCHEMA}
        declared = [
            (f"{name}.{key}", dtype, tensor_shape)
            for name, shape in self._matrices.items()
            for key, (dtype, tensor_shape) in self._kind.storage(shape).items()
        ]
        ours = has_manifest(path)  # any other directory there is refused
        if not ours or not self._usable(path, inputs, declared):
            try:
                with build_directory(path, f"{self.dtype}-weights", inputs, overwrite=ours) as staging:
                    stream_tensors(staging, self._file, declared, self._quantized_tensors(path))
            except EnvironmentFault:  # another process may have made it at the same time
                if not has_manifest(path) or not self._usable(path, inputs, declared):
                    raise
        self._cached = read_header(path / self._file)[0]

    def _usable(self, path: Path, inputs: dict[str, Any], declared: list[DeclaredTensor]) -> bool:
        try:
            if finished_product(path, f"{self.dtype}-weights", inputs) is None:
                raise CheckpointError("incomplete, or not of this base", path)
            verify_product(path)
            stored = {(name, part.dtype, part.shape) for name, part in read_header(path / self._file)[0].items()}
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
            yield from (getattr(packed, key) for key in self._kind.storage(packed.shape))
            self.on_event(Progress("quantising", done, len(self._matrices)))
