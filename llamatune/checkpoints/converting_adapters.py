"""Writes an adapter in other tools' layouts: PEFT's, mlx-lm's, and the GGUF file that llama.cpp puts on a model.

mlx-lm has one rank and one scale for all layers, llama.cpp one alpha: where an adapter has several, B takes the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamatune.checkpoints.adapter import Adapter, add_facts, check_adapter, load_adapter, write_adapter
from llamatune.checkpoints.adapter_config import CONFIG_FILE
from llamatune.checkpoints.adapter_header import adapted_modules
from llamatune.checkpoints.gguf_config import architecture_of, gguf_name, is_interleaved
from llamatune.checkpoints.gguf_model import GgufCheckpoint
from llamatune.checkpoints.model_directory import read_config
from llamatune.checkpoints.row_order import is_rotated, rows_interleaved
from llamatune.checkpoints.tensor_bytes import tensor_bytes, write_tensors
from llamatune.command_options.conversion import ConvertAdapterOptions
from llamatune.durable_writing import refuse_occupied
from llamatune.errors import CheckpointError, SpecError, Stopped
from llamatune.events import Notice, OnEvent, ShouldStop, ignore_event, never_stop
from llamatune.formats.gguf import is_gguf, write_gguf
from llamatune.formats.manifest import Staging, build_directory, finished_product
from llamatune.output_files import output_file, refuse_replacing, write_output
from llamatune.shapes.adapter import ADAPTER_KINDS
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.strict_json import write_json

MLX_WEIGHTS = "adapters.safetensors"
_KIND = "adapter"


@dataclass(frozen=True)
class ConvertAdapterReport:
    """What was written. ``sha256`` is that of a single file; a directory has a manifest."""

    output: str
    format: str
    r: int
    updates: int
    sha256: str | None = None
    already_done: bool = False


@dataclass(frozen=True)
class _Update:
    """The update of one weight, ``scaling`` · B · A; ``magnitude`` is DoRA's, (out,)."""

    weight: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def convert_adapter(
    options: ConvertAdapterOptions, on_event: OnEvent = ignore_event, should_stop: ShouldStop = never_stop
) -> ConvertAdapterReport:
    """Write an adapter in another layout, all at once or not at all.

    Raises:
        CheckpointError: the layout cannot hold the adapter; it does not fit the base; a broken or unsafe file.
        EnvironmentFault: the output is occupied. Stopped: ``should_stop`` said so.
    """
    adapter = load_adapter(options.adapter)
    given = [("--adapter", options.adapter), *([("--model", options.model)] if options.model is not None else [])]
    refuse_replacing(options.output, given)
    if adapter.base_changes:
        what = f"the adapter also changes {', '.join(sorted(adapter.base_changes)[:3])} of the base"
        raise CheckpointError(what, options.adapter, "merge it into the base, and convert that")
    updates = list(_updates(adapter, options.adapter))
    if not updates:
        raise CheckpointError("holds no update of a matrix", options.adapter, "fetch or save it again")
    _refuse_too_large(updates, options.adapter)
    config = None if options.target == "peft" and options.model is None else _base_config(options, adapter, on_event)
    if config is not None:
        check_adapter(adapter, config, on_event=on_event)
    if should_stop():
        raise Stopped("stopped before anything was written", options.output, "run the same command again")
    report = ConvertAdapterReport(
        str(options.output), options.target, max(update.rank for update in updates), len(updates)
    )
    if options.target == "gguf":
        assert config is not None
        return dataclasses.replace(report, sha256=_write_gguf(options, adapter, updates, config))
    inputs = {"adapter_sha256": adapter.digest, "format": options.target, "layers": config and config.num_hidden_layers}
    if finished_product(options.output, _KIND, inputs) is not None:
        return dataclasses.replace(report, already_done=True)
    refuse_occupied(options.output, options.overwrite)
    with build_directory(options.output, _KIND, inputs, options.overwrite) as staging:
        if options.target == "peft":
            write_adapter(staging, adapter)
        else:
            assert config is not None
            _write_mlx(staging, options, adapter, updates, config)
    return report


def _base_config(options: ConvertAdapterOptions, adapter: Adapter, on_event: OnEvent) -> LlamaConfig:
    model = options.model
    if model is None:
        named = Path(adapter.base_path) if adapter.base_path else None
        if named is None or not named.exists():
            what = f"--format {options.target} needs the base's shape"
            raise SpecError(what, "--model", "give the base model's directory")
        model = named
        on_event(Notice(f"{model}: the base that the adapter names"))
    return GgufCheckpoint.open(model).config if is_gguf(model) else read_config(model, on_event)


def _updates(adapter: Adapter, path: Path) -> Iterator[_Update]:
    """Every update; ``CheckpointError`` if one is not whole, or its tensors do not fit each other."""
    kind = ADAPTER_KINDS[adapter.config.kind]
    for module in adapted_modules(adapter.tensors):
        weight, sizes = f"{module}.weight", dict[str, int]()
        for tensor, dimensions in kind.tensors.items():
            name = kind.stored_name(module, tensor)
            if name not in adapter.tensors:
                raise CheckpointError(f"has no {name}", path, "fetch or save it again")
            shape = adapter.tensors[name].shape
            fits = len(shape) == len(dimensions)
            if not fits or any(
                sizes.setdefault(key, size) != size for key, size in zip(dimensions, shape, strict=True)
            ):
                raise CheckpointError(f"{name} is {[*shape]}, which does not fit its module", path, "fetch it again")
        if not all(sizes.values()):
            raise CheckpointError(f"the update of {weight} is empty", path, "fetch it again")
        A, B, *magnitude = adapter.trained(weight)
        yield _Update(weight, A, B, adapter.scaling(weight), magnitude[0] if magnitude else None)


def _refuse_too_large(updates: list[_Update], path: Path) -> None:
    """Refuse scalings with which B or alpha, which the layouts multiply by them, would overflow fp32."""
    for update in updates:
        largest = max(1.0, float(update.B.abs().max())) * abs(update.scaling) * update.rank
        if not largest < torch.finfo(torch.float32).max:
            what = f"the scaling {update.scaling:g} of {update.weight} is too large for fp32"
            raise CheckpointError(what, path, "no training gives such an alpha: fetch it again")


def _common_scaling(updates: list[_Update]) -> float | None:
    """The scaling of all updates; None: they differ, or it is 0, which the tools do not take for a scaling."""
    scalings = {update.scaling for update in updates}
    return scalings.pop() if len(scalings) == 1 and scalings != {0.0} else None


def _write_gguf(options: ConvertAdapterOptions, adapter: Adapter, updates: list[_Update], config: LlamaConfig) -> str:
    """An adapter for ``llama-cli --lora``: names and rows of llama.cpp, everything in fp32."""
    if adapter.config.kind != "lora":
        what = f"a GGUF adapter is plain LoRA, and this one is {adapter.config.kind}"
        raise CheckpointError(what, options.adapter, "merge it into the base and convert that")
    scaling, ranks = _common_scaling(updates), {update.rank for update in updates}
    rank = max(ranks)
    alpha = float(rank) if scaling is None or len(ranks) > 1 else scaling * rank
    declared, data = [], []
    for update in updates:
        B = update.B * (update.scaling / (alpha / update.rank))
        if is_interleaved(config) and is_rotated(update.weight):
            B = rows_interleaved(B, config.head_dim)
        name = gguf_name(update.weight)
        for suffix, tensor in (("lora_a", update.A), ("lora_b", B)):
            contiguous = tensor.float().contiguous()
            declared.append((f"{name}.{suffix}", "F32", tuple(contiguous.shape)))
            data.append(contiguous)
    metadata = {
        "general.architecture": ("str", architecture_of(config)),
        "general.type": ("str", "adapter"),
        "adapter.type": ("str", "lora"),
        "general.name": ("str", options.adapter.resolve().name),
        "general.file_type": ("u32", 0),
        "general.quantization_version": ("u32", 2),
        "adapter.lora.alpha": ("f32", alpha),
    }
    target, digests = output_file(options.output, options.overwrite), list[str]()
    portions = ([tensor_bytes(tensor)] for tensor in data)
    write_output(target, lambda file: digests.append(write_gguf(file, metadata, declared, portions)), options.overwrite)
    return digests[0]


def _write_mlx(
    staging: Staging, options: ConvertAdapterOptions, adapter: Adapter, updates: list[_Update], config: LlamaConfig
) -> None:
    """mlx-lm's two files: A (in, r) and B (r, out) of the last ``num_layers`` blocks, the same layers in each."""
    by_place = {(int(update.weight.split(".")[2]), _place(update.weight)): update for update in updates}
    first, keys = min(layer for layer, _ in by_place), sorted({key for _, key in by_place})
    rank, scaling, kind = max(update.rank for update in updates), _common_scaling(updates), adapter.config.kind
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(first, config.num_hidden_layers):
        for key in keys:
            stem = f"model.layers.{layer}.{key}"
            update = by_place.get((layer, key))
            if update is None and kind != "lora":
                what = f"{stem} is not adapted, which mlx-lm's {kind} cannot say"
                raise CheckpointError(what, options.adapter, "merge it into the base and convert that")
            out_features, in_features = config.linear_shape(key.rpartition(".")[2])
            a, b = torch.zeros(in_features, rank), torch.zeros(rank, out_features)
            if update is not None:
                a[:, : update.rank] = update.A.T
                b[: update.rank] = update.B.T if scaling is not None else update.B.T * update.scaling
                if update.magnitude is not None:
                    tensors[f"{stem}.m"] = update.magnitude
            tensors |= {f"{stem}.lora_a": a, f"{stem}.lora_b": b}
    write_tensors(staging, MLX_WEIGHTS, tensors)
    facts: dict[str, Any] = {
        "fine_tune_type": kind,
        "lora_parameters": {
            "dropout": adapter.config.dropout,
            "keys": keys,
            "rank": rank,
            "scale": 1.0 if scaling is None else scaling,
        },
        "model": str(options.model) if options.model is not None else adapter.base_path,
        "num_layers": config.num_hidden_layers - first,
    }
    write_json(staging.path / CONFIG_FILE, facts)
    add_facts(staging, adapter)


def _place(weight: str) -> str:
    """Where a weight's layer lives in its block: ``self_attn.q_proj``."""
    return weight.removesuffix(".weight").split(".", 3)[3]
