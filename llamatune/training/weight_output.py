"""Writing and reading back trained weights: an adapter or a whole model, as checkpoint, best/ or result."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llamatune.checkpoints.adapter import Adapter, load_adapter, write_adapter
from llamatune.checkpoints.huggingface import write_huggingface
from llamatune.checkpoints.tensor_bytes import write_tensors
from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError
from llamatune.formats.manifest import Staging, build_directory
from llamatune.spec import RunSpec
from llamatune.strict_json import dump_json
from llamatune.training.inputs import Inputs
from llamatune.training.learner import Learner
from llamatune.training.run_files import ADAPTER, MODEL

_WEIGHTS = "weights.safetensors"
EVALUATION = "evaluation.json"
"""In ``best/``: step, epoch, loss, perplexity, rows and target tokens of the evaluation of these weights."""


class WeightOutput(abc.ABC):
    """Writes and restores the trained weights; ``kind`` names the product, and its directory in the run."""

    kind: str

    def __init__(self, spec: RunSpec, inputs: Inputs, learner: Learner) -> None:
        self._spec, self._inputs, self._parameters = spec, inputs, learner.parameters
        self._template = inputs.prepared.manifest.template

    @abc.abstractmethod
    def write_checkpoint(self, staging: Staging) -> None:
        """Write the trained tensors, bit for bit, into a checkpoint's staging directory."""

    @abc.abstractmethod
    def read_checkpoint(self, checkpoint: Path) -> Mapping[str, Tensor]:
        """The trained tensors of a verified checkpoint."""

    @abc.abstractmethod
    def write_product(self, staging: Staging) -> None:
        """Write the adapter or model for other programs."""

    @torch.no_grad()
    def restore(self, checkpoint: Path) -> None:
        """Load the tensors of a verified checkpoint."""
        tensors = self.read_checkpoint(checkpoint)
        if self._parameters.keys() != tensors.keys():
            raise CheckpointError("its tensors are not those that this run trains", checkpoint)
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])

    def write_best(self, path: Path, evaluation: Mapping[str, Any]) -> None:
        """Replace ``best/`` by the current weights, with their ``evaluation`` in ``evaluation.json``."""
        with build_directory(path, self.kind, {}, overwrite=True) as staging:
            self.write_product(staging)
            with writing(staging.path / EVALUATION) as file:
                file.write(dump_json(evaluation))

    def write_final(self, run: Path) -> None:
        """Write ``adapter/`` or ``model/`` into the run directory."""
        with build_directory(run / self.kind, self.kind, {}, overwrite=True) as staging:
            self.write_product(staging)


def weight_output(spec: RunSpec, inputs: Inputs, learner: Learner) -> WeightOutput:
    """An adapter's writer where the spec has a lora section, else the whole model's."""
    return (_WholeModel if spec.lora is None else _AdapterOnly)(spec, inputs, learner)


class _AdapterOnly(WeightOutput):
    """A checkpoint of an adapter is a PEFT directory too: ``generate`` and ``merge-lora`` take it."""

    kind = ADAPTER

    def write_checkpoint(self, staging: Staging) -> None:
        assert self._spec.adapter is not None
        fingerprint, base = self._inputs.base_fingerprint, self._spec.model.path
        tensors: dict[str, Tensor] = dict(self._parameters)
        write_adapter(staging, Adapter(self._spec.adapter, tensors, fingerprint, self._template, base))

    write_product = write_checkpoint

    def read_checkpoint(self, checkpoint: Path) -> Mapping[str, Tensor]:
        return load_adapter(checkpoint).tensors


class _WholeModel(WeightOutput):
    kind = MODEL

    def write_checkpoint(self, staging: Staging) -> None:
        write_tensors(staging, _WEIGHTS, self._parameters)

    def read_checkpoint(self, checkpoint: Path) -> Mapping[str, Tensor]:
        return load_file(checkpoint / _WEIGHTS)

    def write_product(self, staging: Staging) -> None:
        staging.facts["template"] = self._template
        base, parameters = Path(self._spec.model.path), self._parameters
        write_huggingface(staging, self._inputs.config, parameters.__getitem__, lambda name: torch.float32, base)
