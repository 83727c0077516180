"""LoRA adapters, read as PEFT and mlx-lm write them and written as PEFT directories.

The file must hold exactly the tensors that its configuration describes. Our own facts (fingerprint of the base,
template) are in the manifest beside them, which PEFT ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llamatune.checkpoints.adapter_config import CONFIG_FILE, dump_config
from llamatune.checkpoints.adapter_header import (
    EMBEDDING,
    HEAD,
    PREFIX,
    WEIGHTS_FILE,
    AdapterHeader,
    is_update_in_block,
    read_adapter_header,
)
from llamatune.checkpoints.adapter_sizes import other_size
from llamatune.checkpoints.base_changes import BaseChange, changed_config, collect_changes
from llamatune.checkpoints.base_with_changes import changed_base
from llamatune.checkpoints.checkpoint import READ_WEIGHTS, Checkpoint, fill_from, refuse_unfit
from llamatune.checkpoints.tensor_bytes import is_finite, write_tensors
from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.formats.manifest import MANIFEST, Staging, find_manifest
from llamatune.formats.safetensors import TensorLocation
from llamatune.model.adapters.apply import adapter_class
from llamatune.model.torch_dtypes import STORED_WEIGHTS
from llamatune.safe_reading import digest_file
from llamatune.shapes.adapter import ADAPTER_KINDS, AdapterSpec
from llamatune.shapes.dtypes import QUANTIZED_DTYPES
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.strict_json import write_json
from llamatune.tokenizers.loading import tokenizer_file

_BELONG = "adapter_config.json, its tensors and the base must belong together"
_LONGEST_STATEMENT = 600
_BASE_DTYPE = "base_dtype"
"""In the manifest: what the base was quantised to."""


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter, its configuration and its base.

    ``tensors`` are named like ``model.layers.0.self_attn.q_proj.lora_A.weight``: A (R, in), B (out, R), fp32. What it
    changes beside the layers of blocks are ``base_changes``, by the names of the base's tensors.
    ``base_path`` is the base as the user named it, ``digest`` the SHA-256 of the file it was loaded from.
    ``base_dtype`` is what the base was quantised to in training; None: it was not, or nothing is known.
    """

    config: AdapterSpec
    tensors: dict[str, torch.Tensor]
    base_fingerprint: str | None = None
    template: dict[str, Any] | None = None
    base_path: str | None = None
    path: Path | None = None
    digest: str | None = None
    base_changes: Mapping[str, BaseChange] = field(default_factory=dict)
    header: AdapterHeader | None = None
    base_dtype: str | None = None

    def changes(self, name: str) -> bool:
        """Whether the merged model's weight called ``name`` is another than the base's."""
        return bool(self.trained(name))

    def merged(self, name: str, W: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
        """The merged model's weight called ``name``, of the rows ``rows`` of it; ``W`` holds the base's.

        It is fp32, in memory that the caller may overwrite.
        """
        return adapter_class(self.config.kind).merged(W, self.trained(name), self.scaling(name), rows)

    def scaling(self, name: str) -> float:
        """Of the update of the weight called ``name``."""
        path = name.split(".")  # model.layers.0.self_attn.q_proj.weight
        return self.config.scaling(path[-2], int(path[2]))

    @property
    def tokenizer_path(self) -> Path | None:
        """The directory whose tokenizer belongs to it; None: the base's does.

        An adapter that changes embedding or head was trained with the tokenizer beside it, which may have more tokens.
        """
        if self.header is None or not self.base_changes.keys() & {f"{EMBEDDING}.weight", f"{HEAD}.weight"}:
            return None
        return None if tokenizer_file(self.header.path) is None else self.header.path

    def on(self, base: Checkpoint) -> Checkpoint:
        """The base as its model is with this adapter, apart from the updates of layers that ``tensors`` hold."""
        return changed_base(base, self.base_changes, self.header is not None and self.header.config.tied)

    def facts(self) -> dict[str, Any]:
        """What is computed with its tensors, as JSON."""
        changes = {name: change.facts() for name, change in self.base_changes.items()}
        return self.config.facts() | ({"base_changes": changes} if changes else {})

    def trained(self, name: str) -> tuple[torch.Tensor, ...]:
        """The adapter's tensors for the weight called ``name``, none where it has no update."""
        stem, kind = name.removesuffix(".weight"), ADAPTER_KINDS[self.config.kind]
        names = [kind.stored_name(stem, tensor) for tensor in kind.tensors]
        return tuple(self.tensors[name] for name in names if name in self.tensors)


def load_adapter(path: Path) -> Adapter:
    """Read an adapter directory of PEFT, ours or its own, or of mlx-lm into fp32 on the CPU.

    It is not yet checked against a base.

    Raises:
        CheckpointError: no adapter, a configuration that LLaMA cannot honour, a broken, unsafe or changed file, NaN or
            infinity.
    """
    header = read_adapter_header(path)
    file = header.file
    digest, manifest = digest_file(file), find_manifest(header.path)  # PEFT's own adapters have no manifest
    if manifest and manifest.files.get(file.name, (0, digest))[1] != digest:
        raise CheckpointError(
            "differs from what its manifest recorded", file,
            f"fetch it again, or remove {MANIFEST} if you changed it yourself",
        )  # fmt: skip
    fingerprint, template = (manifest.base_fingerprint, manifest.template) if manifest else (None, None)
    tensors = {name: _read(name, location) for name, location in header.tensors.items()}
    low_rank = {name: tensor for name, tensor in tensors.items() if is_update_in_block(name)}
    changes = collect_changes(header, {name: tensors[name] for name in tensors.keys() - low_rank.keys()})
    base = header.config.base
    if base is None and manifest:  # it names no base that PEFT cannot open
        base = manifest.base_path
    held = manifest.facts.get(_BASE_DTYPE) if manifest else None
    quantized = held if held in QUANTIZED_DTYPES else None
    return Adapter(header.spec, low_rank, fingerprint, template, base, path, digest, changes, header, quantized)


def _read(name: str, location: TensorLocation) -> torch.Tensor:
    if location.dtype not in READ_WEIGHTS:
        raise CheckpointError(f"{name} is {location.dtype}, not a float tensor", location.path, "fetch it again")
    tensor = torch.empty(location.shape, dtype=STORED_WEIGHTS.get(location.dtype, torch.float32))
    fill_from(tensor, location)
    if not is_finite(tensor):
        raise CheckpointError(f"{name} holds NaN or infinity", location.path, "the training that wrote it had diverged")
    return tensor.float()


def check_adapter(
    adapter: Adapter,
    config: LlamaConfig,
    fingerprint: str | None = None,
    force_base: bool = False,
    on_event: OnEvent = ignore_event,
) -> None:
    """Check that the adapter belongs to the base: exactly the expected tensors and shapes, and the same fingerprint.

    Args:
        fingerprint: the base's; None where there are no weights to compare with.
        force_base: accept another base of the same shape.

    Raises:
        CheckpointError: tensors missing, unexpected or misshapen (named), or made for another base, and what differs.
    """
    where, header = adapter.path or Path("adapter"), adapter.header
    is_known = fingerprint is not None and adapter.base_fingerprint is not None
    is_of_another = is_known and adapter.base_fingerprint != fingerprint
    of_another = f"the adapter was trained on another base{f' ({adapter.base_path})' if adapter.base_path else ''}"
    differs = None
    try:
        expected, found, todo = _stated_tensors(adapter, config)
        if is_of_another or not is_known:
            differs = other_size(expected, found, config)
        refuse_unfit(where, expected, found, todo)
    except CheckpointError:
        if differs or is_of_another:  # what does not fit follows from that
            told = f" ({differs})" if differs else ""
            raise CheckpointError(f"{of_another}, of another shape{told}", where, "give that base") from None
        raise
    for name in found:
        if name.startswith(f"{HEAD}.") and name.endswith(".bias"):
            raise CheckpointError(f"{name} adds a bias to the head, which LLaMA has none of", where)
    changed_config(config, adapter.base_changes, header is not None and header.config.tied, where)
    of_B = [name for name in adapter.tensors if name.endswith(".lora_B.weight")]
    changes_more = adapter.config.kind == "dora" or adapter.base_changes
    if not changes_more and not any(adapter.tensors[name].any() for name in of_B):
        on_event(Notice(f"{where}: every lora_B is zero, so the adapter changes nothing", "warning"))
    if fingerprint is None:
        return
    if adapter.base_fingerprint is None:
        on_event(Notice(f"{where}: it does not say which base it was trained on; make sure it is this one", "warning"))
    elif is_of_another:
        if not force_base:
            raise CheckpointError(of_another, where, "give that base, or pass --force-base")
        on_event(Notice(f"{where}: used on another base than it was trained on, as --force-base asks", "warning"))


def _stated_tensors(
    adapter: Adapter, config: LlamaConfig
) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, TensorLocation] | Mapping[str, torch.Tensor], str]:
    """The tensors that its configuration says, in the base's shapes; those that it has; what to do if they differ."""
    header = adapter.header
    if header is None:
        return dict(adapter.config.checkpoint_shapes(config)), adapter.tensors, _BELONG
    stated = f"{_BELONG}; it says {', '.join(f'{key} {value}' for key, value in header.config.stated.items())}"
    return header.expected(config), header.tensors, stated[:_LONGEST_STATEMENT]


def write_adapter(staging: Staging, adapter: Adapter) -> None:
    """PEFT's two files, and our facts for the manifest; never a tensor with NaN or infinity."""
    for name, tensor in adapter.tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(f"{name} holds NaN or infinity and is not saved", staging.path)
    write_json(staging.path / CONFIG_FILE, dump_config(adapter.config, adapter.base_path))
    tensors = {f"{PREFIX}{name}": adapter.tensors[name].detach().float() for name in sorted(adapter.tensors)}
    write_tensors(staging, WEIGHTS_FILE, tensors)
    add_facts(staging, adapter)


def add_facts(staging: Staging, adapter: Adapter) -> None:
    """To the manifest, what it says of the adapter's training and no other file does."""
    staging.facts.update(base_fingerprint=adapter.base_fingerprint, template=adapter.template)
    if adapter.base_dtype is not None:
        staging.facts[_BASE_DTYPE] = adapter.base_dtype
