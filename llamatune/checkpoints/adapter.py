"""LoRA adapters as PEFT directories: ``adapter_config.json`` and ``adapter_model.safetensors``.

The configuration is a closed schema, and the file must hold exactly the tensors that it describes: PEFT itself loads an
adapter without ``lora_alpha``, or with other modules than its file, and silently computes something else. Our own facts
(fingerprint of the base, template) are in the manifest beside them, which PEFT ignores.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamatune.checkpoints.adapter_config import CONFIG_FILE, dump_config, read_adapter_config
from llamatune.checkpoints.checkpoint import read_into, refuse_unfit
from llamatune.checkpoints.tensor_bytes import is_finite, write_tensors
from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.formats.manifest import MANIFEST, Staging, find_manifest
from llamatune.formats.safetensors import read_header
from llamatune.model.torch_dtypes import STORED_WEIGHTS
from llamatune.safe_reading import digest_file
from llamatune.shapes.adapter import ADAPTER_KINDS, AdapterSpec
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.strict_json import write_json

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """The tensors of an adapter, its configuration and its base.

    ``tensors`` are named like ``model.layers.0.self_attn.q_proj.lora_A.weight``: A (R, in), B (out, R), fp32.
    ``base_path`` is the base as the user named it, ``digest`` the SHA-256 of the file it was loaded from.
    """

    config: AdapterSpec
    tensors: dict[str, torch.Tensor]
    base_fingerprint: str | None = None
    template: dict[str, Any] | None = None
    base_path: str | None = None
    path: Path | None = None
    digest: str | None = None

    def trained(self, name: str) -> tuple[torch.Tensor, ...]:
        """The adapter's tensors for the weight called ``name``, none where it has no update."""
        stem = name.removesuffix(".weight")
        names = [f"{stem}.{tensor}.weight" for tensor in ADAPTER_KINDS[self.config.kind].tensors]
        return tuple(self.tensors[name] for name in names if name in self.tensors)


def load_adapter(path: Path) -> Adapter:
    """Read a PEFT adapter directory, ours or PEFT's own, into fp32 on the CPU. It is not yet checked against a base.

    Raises:
        CheckpointError: no adapter, a configuration that is not plain LoRA, a pickle, a broken or changed file, NaN or
            infinity.
    """
    config, base_path = read_adapter_config(path)
    file = path / WEIGHTS_FILE
    if not file.exists() and (path / "adapter_model.bin").exists():
        raise CheckpointError(
            "adapter_model.bin is not read: it is a pickle and can run code", path,
            "save the adapter as safetensors (PEFT: save_pretrained(..., safe_serialization=True))",
        )  # fmt: skip
    entries, _ = read_header(file)
    digest, manifest = digest_file(file), find_manifest(path)  # PEFT's own adapters have no manifest
    if manifest and manifest.files.get(WEIGHTS_FILE, (0, digest))[1] != digest:
        raise CheckpointError(
            "differs from what its manifest recorded", file,
            f"fetch it again, or remove {MANIFEST} if you changed it yourself",
        )  # fmt: skip
    fingerprint, template = (manifest.base_fingerprint, manifest.template) if manifest else (None, None)
    tensors = {}
    for stored, entry in entries.items():
        if entry.dtype not in STORED_WEIGHTS:
            raise CheckpointError(f"{stored} is {entry.dtype}, not a float tensor", file, "fetch it again")
        tensor = torch.empty(entry.shape, dtype=STORED_WEIGHTS[entry.dtype])
        read_into(file, entry.begin, tensor)
        if not is_finite(tensor):
            raise CheckpointError(f"{stored} holds NaN or infinity", file, "the training that wrote it had diverged")
        tensors[stored.removeprefix(_PREFIX) if stored.startswith(_PREFIX) else f"({stored})"] = tensor.float()
    if base_path is None and manifest:  # the configuration names no base that PEFT cannot open
        base_path = manifest.base_path
    return Adapter(config, tensors, fingerprint, template, base_path, path, digest)


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
        CheckpointError: tensors missing, unexpected or misshapen (named), or made for another base.
    """
    where = adapter.path or Path("adapter")
    todo = "adapter_config.json, its tensors and the base must belong together"
    refuse_unfit(where, dict(adapter.config.checkpoint_shapes(config)), adapter.tensors, todo)
    if not any(tensor.any() for name, tensor in adapter.tensors.items() if name.endswith(".lora_B.weight")):
        on_event(Notice(f"{where}: every lora_B is zero, so the adapter changes nothing", "warning"))
    if fingerprint is None:
        return
    if adapter.base_fingerprint is None:
        on_event(Notice(f"{where}: it does not say which base it was trained on; make sure it is this one", "warning"))
    elif adapter.base_fingerprint != fingerprint:
        if not force_base:
            named = f" ({adapter.base_path})" if adapter.base_path else ""
            raise CheckpointError(
                f"the adapter was trained on another base{named}", where, "give that base, or pass --force-base"
            )
        on_event(Notice(f"{where}: used on another base than it was trained on, as --force-base asks", "warning"))


def write_adapter(staging: Staging, adapter: Adapter) -> None:
    """PEFT's two files, and our facts for the manifest; never a tensor with NaN or infinity."""
    for name, tensor in adapter.tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(f"{name} holds NaN or infinity and is not saved", staging.path)
    write_json(staging.path / CONFIG_FILE, dump_config(adapter.config, adapter.base_path))
    tensors = {f"{_PREFIX}{name}": adapter.tensors[name].detach().float() for name in sorted(adapter.tensors)}
    write_tensors(staging, WEIGHTS_FILE, tensors)
    staging.facts.update(base_fingerprint=adapter.base_fingerprint, template=adapter.template)
