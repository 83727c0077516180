"""Writing and reading back trained weights: an adapter or a whole model, as checkpoint, best/ or result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llamatune.checkpoints.adapter import Adapter, load_adapter, save_adapter, write_adapter_files
from llamatune.checkpoints.huggingface import write_huggingface
from llamatune.checkpoints.tensors import write_tensors
from llamatune.errors import CheckpointError
from llamatune.files import Staging, build_directory, dump_json, writing
from llamatune.spec import RunSpec
from llamatune.training.inputs import Inputs
from llamatune.training.learner import Learner
from llamatune.training.run_files import ADAPTER, MODEL

_WEIGHTS = "weights.safetensors"
EVALUATION = "evaluation.json"
"""In ``best/``: step, epoch, loss, perplexity, rows and target tokens of the evaluation of these weights."""


class WeightOutput(Protocol):
    """Writes and restores the trained weights, an adapter's or all."""

    def write_checkpoint(self, staging: Staging) -> None:
        """Write the trained tensors, bit for bit, into a checkpoint's staging directory."""

    def restore(self, checkpoint: Path) -> None:
        """Load the tensors of a verified checkpoint."""

    def write_best(self, path: Path, evaluation: Mapping[str, Any]) -> None:
        """Replace ``best/`` by the current weights, with their ``evaluation`` in ``evaluation.json``."""

    def write_final(self, run: Path) -> None:
        """Write ``adapter/`` or ``model/`` into the run directory."""


def weight_output(spec: RunSpec, inputs: Inputs, learner: Learner) -> WeightOutput:
    """An adapter's writer where the spec has a lora section, else the whole model's."""
    return _WholeModel(spec, inputs, learner) if spec.lora is None else _AdapterOnly(spec, inputs, learner)


def _fill(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], where: Path) -> None:
    if parameters.keys() != tensors.keys():
        raise CheckpointError("its tensors are not those that this run trains", where)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _write_evaluation(staging: Staging, evaluation: Mapping[str, Any]) -> None:
    with writing(staging.path / EVALUATION) as file:
        file.write(dump_json(evaluation))


class _AdapterOnly:
    """A checkpoint of an adapter is a PEFT directory too: ``generate`` and ``merge-lora`` take it."""

    def __init__(self, spec: RunSpec, inputs: Inputs, learner: Learner) -> None:
        assert spec.adapter is not None
        self._learner, self._config = learner, spec.adapter
        self._fingerprint, self._base = inputs.base_fingerprint, spec.model.path
        self._template = inputs.prepared.facts.get("template")

    def _adapter(self) -> Adapter:
        return Adapter(self._config, dict(self._learner.parameters), self._fingerprint, self._template, self._base)

    def write_checkpoint(self, staging: Staging) -> None:
        write_adapter_files(staging, self._adapter())
        staging.facts.update(base_fingerprint=self._fingerprint, template=self._template)

    def restore(self, checkpoint: Path) -> None:
        _fill(self._learner.parameters, load_adapter(checkpoint).tensors, checkpoint)

    def write_best(self, path: Path, evaluation: Mapping[str, Any]) -> None:
        with build_directory(path, "adapter", {}, overwrite=True) as staging:
            self.write_checkpoint(staging)
            _write_evaluation(staging, evaluation)

    def write_final(self, run: Path) -> None:
        save_adapter(run / ADAPTER, self._adapter(), overwrite=True)


class _WholeModel:
    def __init__(self, spec: RunSpec, inputs: Inputs, learner: Learner) -> None:
        self._learner, self._config, self._base = learner, inputs.config, Path(spec.model.path)
        self._template = inputs.prepared.facts.get("template")

    def write_checkpoint(self, staging: Staging) -> None:
        write_tensors(staging, _WEIGHTS, self._learner.parameters)

    def restore(self, checkpoint: Path) -> None:
        _fill(self._learner.parameters, load_file(checkpoint / _WEIGHTS), checkpoint)

    def write_best(self, path: Path, evaluation: Mapping[str, Any]) -> None:
        with build_directory(path, "model", {}, overwrite=True) as staging:
            self._write_model(staging)
            _write_evaluation(staging, evaluation)

    def write_final(self, run: Path) -> None:
        with build_directory(run / MODEL, "model", {}, overwrite=True) as staging:
            self._write_model(staging)

    def _write_model(self, staging: Staging) -> None:
        staging.facts["template"] = self._template
        write_huggingface(staging, self._config, self._learner.parameters, torch.float32, self._base)
