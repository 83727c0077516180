"""Writing and reading back trained weights: an adapter or a whole model, as checkpoint, best/ or result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from llamatune.checkpoints.adapter import Adapter, load_adapter, write_adapter_files
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


class WeightOutput:
    """Writes the trained weights, an adapter or the whole model, and restores them."""

    def __init__(self, spec: RunSpec, inputs: Inputs, learner: Learner) -> None:
        self._spec, self._inputs, self._parameters = spec, inputs, learner.parameters
        self._kind = MODEL if spec.lora is None else ADAPTER

    def write_checkpoint(self, staging: Staging) -> None:
        """Write the trained tensors, bit for bit, into a checkpoint's staging directory.

        A checkpoint of an adapter is a PEFT directory too: ``generate`` and ``merge-lora`` take it.
        """
        if self._spec.adapter is None:
            write_tensors(staging, _WEIGHTS, self._parameters)
        else:
            self._write_product(staging)

    @torch.no_grad()
    def restore(self, checkpoint: Path) -> None:
        """Load the tensors of a verified checkpoint."""
        whole = self._spec.adapter is None
        tensors = load_file(checkpoint / _WEIGHTS) if whole else load_adapter(checkpoint).tensors
        if self._parameters.keys() != tensors.keys():
            raise CheckpointError("its tensors are not those that this run trains", checkpoint)
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])

    def write_best(self, path: Path, evaluation: Mapping[str, Any]) -> None:
        """Replace ``best/`` by the current weights, with their ``evaluation`` in ``evaluation.json``."""
        with build_directory(path, self._kind, {}, overwrite=True) as staging:
            self._write_product(staging)
            with writing(staging.path / EVALUATION) as file:
                file.write(dump_json(evaluation))

    def write_final(self, run: Path) -> None:
        """Write ``adapter/`` or ``model/`` into the run directory."""
        with build_directory(run / self._kind, self._kind, {}, overwrite=True) as staging:
            self._write_product(staging)

    def _write_product(self, staging: Staging) -> None:
        """Write the adapter or model for other programs."""
        base, adapter, fingerprint = self._spec.model.path, self._spec.adapter, self._inputs.base_fingerprint
        template = self._inputs.prepared.manifest.template
        if adapter is None:
            tensor = self._parameters.__getitem__
            write_huggingface(staging, self._inputs.config, tensor, lambda name: torch.float32, Path(base))
        else:
            write_adapter_files(staging, Adapter(adapter, dict(self._parameters), fingerprint, template, base))
            staging.facts["base_fingerprint"] = fingerprint
        staging.facts["template"] = template
