"""A base in NF4, quantised while it is read, or read from a cache on disk of quantised weights.

The cache is a directory of products, one for each base: ``nf4-<fingerprint>-<layers>/nf4.safetensors`` holds the
tensors of ``nf4.storage`` as ``<name>.<tensor>``. A product that does not match its manifest is made again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from llamatune.checkpoints.checkpoint import Checkpoint, read_into
from llamatune.checkpoints.tensor_bytes import is_finite, tensor_bytes
from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError, LlamatuneError, Stopped
from llamatune.events import Notice, OnEvent, Progress, ShouldStop
from llamatune.formats.manifest import build_directory, finished_product, has_manifest, verify_product
from llamatune.formats.safetensors import TensorEntry, TensorWriter, data_bytes, read_header
from llamatune.model.nf4 import NF4Weight, Scratch, quantize_nf4, storage
from llamatune.model.torch_dtypes import STORED_NAMES
from llamatune.shapes.config import LINEAR_MODULES, LlamaConfig, linear_path

_FILE, _KIND = "nf4.safetensors", "nf4-weights"
SCHEMA = 1


class QuantizedBase:
    """Gives the NF4 form of each linear layer of the blocks, on ``device``, and None for every other tensor.

    Peak memory is that of the tensors given out, and of one tensor as stored and a few megabytes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        device: torch.device,
        on_event: OnEvent,
        should_stop: ShouldStop,
    ) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.on_event, self.should_stop = on_event, should_stop
        shapes = dict(config.parameter_shapes())
        self._matrices = {
            name: shapes[name]
            for layer in range(config.num_hidden_layers)
            for module in LINEAR_MODULES
            for name in [f"model.layers.{layer}.{linear_path(module)}.weight"]
        }
        self._layers = config.num_hidden_layers
        self._scratch = Scratch()
        self._cached: tuple[Path, Mapping[str, TensorEntry]] | None = None

    def __call__(self, name: str) -> NF4Weight | None:
        """The matrix ``name`` of a checkpoint, quantised anew or from the cache."""
        if name not in self._matrices:
            return None
        if self._cached is None:
            return self._quantize(name)
        file, entries = self._cached
        tensors = {}
        for key, (dtype, shape) in storage(self._matrices[name]).items():
            tensor = torch.empty(shape, dtype=dtype)
            read_into(file, entries[f"{name}.{key}"].begin, tensor)
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
        path = directory / f"nf4-{base_fingerprint.removeprefix('sha256:')[:16]}-{self._layers}"
        inputs = {"base": base_fingerprint, "layers": self._layers, "schema": SCHEMA}
        if not self._usable(path, inputs):
            self._write(path, inputs)
        self._cached = path / _FILE, read_header(path / _FILE)[0]

    def _usable(self, path: Path, inputs: Mapping[str, object]) -> bool:
        if not has_manifest(path):
            return False
        try:
            if finished_product(path, _KIND, dict(inputs)) is None:
                raise CheckpointError("incomplete, or not of this base", path)
            verify_product(path)
            entries = read_header(path / _FILE)[0]
            if {name: (entry.dtype, entry.shape) for name, entry in entries.items()} != self._declared():
                raise CheckpointError("not the tensors of this base", path)
        except LlamatuneError as fault:
            self.on_event(Notice(f"quantised weights are made again: {fault}", "warning"))
            return False
        return True

    def _declared(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            f"{name}.{key}": (STORED_NAMES[dtype], tensor_shape)
            for name, shape in self._matrices.items()
            for key, (dtype, tensor_shape) in storage(shape).items()
        }

    def _write(self, path: Path, inputs: Mapping[str, object]) -> None:
        declared = [(name, dtype, shape) for name, (dtype, shape) in self._declared().items()]
        ours = has_manifest(path)  # any other directory there is refused
        with (
            build_directory(path, _KIND, dict(inputs), overwrite=ours) as staging,
            writing(staging.path / _FILE, data_bytes(declared)) as file,
        ):
            writer = TensorWriter(file, declared, {"format": "pt"})
            for done, name in enumerate(self._matrices):
                if self.should_stop():
                    raise Stopped("stopped while quantising the model", path, "run the same command again")
                packed = self._quantize(name)
                for key in storage(packed.shape):
                    tensor = getattr(packed, key).cpu().contiguous()
                    writer.write(tensor_bytes(tensor))
                self.on_event(Progress("quantising", done + 1, len(self._matrices)))
            staging.digests[_FILE] = writer.finish()
