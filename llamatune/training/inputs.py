"""The inputs of a run: base, prepared rows, starting adapter, device, each checked against the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamatune import __version__
from llamatune.checkpoints.adapter import Adapter, check_adapter, load_adapter
from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.checkpoints.model_directory import read_config
from llamatune.data.batches import Prepared, Split, open_prepared, refuse_disagreement
from llamatune.data.model_compatibility import check_rows, check_tokenizer
from llamatune.data.shared_rows import warn_of_shared_rows
from llamatune.devices import choose_device
from llamatune.errors import CheckpointError, SpecError
from llamatune.events import Notice, OnEvent
from llamatune.formats.manifest import Manifest
from llamatune.formats.prepared import AT_ONCE_BYTES, verify_rows
from llamatune.ranks import ALONE, Ranks
from llamatune.shapes.counts import ParameterCount, count_parameters
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shared_work import refuse_differences
from llamatune.spec import RunSpec
from llamatune.training.precision import check_precision


@dataclass(frozen=True)
class Inputs:
    """What a run reads, opened and checked; no weights are loaded yet."""

    config: LlamaConfig
    checkpoint: Checkpoint | None
    base_fingerprint: str
    prepared: Prepared
    validation: Split | None
    starting_adapter: Adapter | None
    digests: dict[str, Any]
    count: ParameterCount
    device: torch.device
    row_manifests: tuple[Manifest, ...] = ()


def open_inputs(spec: RunSpec, force_base: bool, on_event: OnEvent, ranks: Ranks = ALONE) -> Inputs:
    """Choose the device, open the base and the data, and raise where they do not fit together. Cheap checks first.

    Each rank opens its own; they must find the same.
    """
    device = choose_device(spec.training.device, on_event, None if ranks.size == 1 else ranks.local_rank)
    check_precision(spec, device, on_event)
    if ranks.is_first or ranks.local_rank == 0:
        verify_rows(*spec.data.train_paths, *spec.data.validation_paths, at_most_bytes=AT_ONCE_BYTES)
    prepared = open_prepared(*spec.data.train_paths)
    other = open_prepared(*spec.data.validation_paths) if spec.data.validation_paths else None
    row_manifests = (*prepared.manifests, *(other.manifests if other else ()))
    refuse_disagreement(row_manifests)
    validation = other.train if other else prepared.validation
    base = Path(spec.model.path)
    if spec.model.init == "random":
        checkpoint, config = None, read_config(base, on_event, spec.model.variant).with_layers(spec.model.num_layers)
        base_fingerprint = f"random:{spec.training.seed}"
    else:
        checkpoint = open_checkpoint(base, on_event, spec.model.variant)
        config = checkpoint.config.with_layers(spec.model.num_layers)
        base_fingerprint = fingerprint(checkpoint)
    wanted = spec.evaluation
    if validation is None and ((wanted.every_steps and not wanted.prompts) or wanted.early_stopping_patience):
        raise SpecError(
            "there is no validation data to evaluate on",
            "evaluation",
            "prepare it with --validation-fraction, name it in data.validation, or drop the section",
        )
    check_rows(prepared.train, config, f"{_listed(spec.data.train_paths)} against {base}", on_event)
    if validation is not None:
        directories = spec.data.validation_paths or spec.data.train_paths
        check_rows(validation, config, f"{_listed(directories)} against {base}", on_event)
    check_tokenizer(prepared, base, force_base, on_event)
    _report_templates(prepared, on_event)
    if ranks.is_first:
        warn_of_shared_rows(prepared, other, base, on_event)
    starting_adapter = _starting_adapter(spec, config, base_fingerprint, force_base, on_event)
    count = count_parameters(config, spec.adapter)
    validation_digest = other.digest if other else None
    digests = {"base": base_fingerprint, "train": prepared.digest, "validation": validation_digest}
    refuse_differences({"spec": spec.flat(), "torch": torch.__version__, "llamatune": __version__, **digests}, ranks)
    rows = (prepared, validation)
    return Inputs(
        config, checkpoint, base_fingerprint, *rows, starting_adapter, digests, count, device, row_manifests
    )  # fmt: skip


def _listed(directories: Sequence[Path]) -> str:
    return ", ".join(map(str, directories))


def _report_templates(prepared: Prepared, on_event: OnEvent) -> None:
    """Say which template generate will use, if the rows of several directories were put in different ones."""
    made = [found.template or {} for found in prepared.manifests]
    names = list(dict.fromkeys(str(template.get("name")) for template in made))
    if any(template != made[0] for template in made):
        chosen = (prepared.manifest.template or {}).get("name")
        what = f"data.train: rows in different templates ({', '.join(names)})"
        on_event(Notice(f"{what}; generate uses {chosen!r} by default"))


def _starting_adapter(
    spec: RunSpec, config: LlamaConfig, base_fingerprint: str, force_base: bool, on_event: OnEvent
) -> Adapter | None:
    """The adapter of ``lora.init_from``, which must be of the shape that the lora section describes."""
    shape = spec.adapter
    if shape is None or spec.lora is None or spec.lora.init_from is None:
        return None
    adapter = load_adapter(Path(spec.lora.init_from))
    check_adapter(adapter, config, base_fingerprint, force_base, on_event)
    where, own = spec.lora.init_from, adapter.config
    if adapter.base_changes:
        what = f"the adapter also changes {', '.join(sorted(adapter.base_changes)[:3])} of the base"
        raise CheckpointError(what, where, "merge it into the base and start from that")
    wanted = shape.stored()
    if own.kind != wanted.kind or own.updates(config) != wanted.updates(config):
        alpha = own.scaling() * (math.sqrt(own.r) if shape.use_rslora else own.r)
        raise CheckpointError(
            f"the adapter is {own.kind} of r {own.r}, scaled by {own.scaling():g}, on {', '.join(own.target_modules)}",
            where,
            f"give the lora section the same, which is r {own.r} with alpha {alpha:g} here",
        )
    return adapter
