"""mlx-lm's ``adapter_config.json``, beside ``adapters.safetensors``. No torch.

It states the scaling itself where PEFT states alpha, counts ``num_layers`` from the last block, and stores A (in, r)
and B (r, out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamatune.checkpoints.adapter_config import AdapterConfig
from llamatune.shapes.adapter import AdapterSpec
from llamatune.strict_json import JsonFields

MLX_WEIGHTS = "adapters.safetensors"
MLX_TENSORS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
"""PEFT's names of mlx-lm's tensors."""


def is_mlx(fields: JsonFields) -> bool:
    """Whether mlx-lm wrote this configuration."""
    return "peft_type" not in fields.raw and bool({"lora_parameters", "fine_tune_type"} & fields.raw.keys())


@dataclass(frozen=True)
class MlxConfig(AdapterConfig):
    """What mlx-lm's configuration says; ``keys``: the names of what is adapted, within a block or the model."""

    layers: int
    keys: frozenset[str]

    @property
    def tied(self) -> bool:
        return True

    @property
    def stated(self) -> dict[str, Any]:
        keys = ("num_layers", "lora_layers", "lora_parameters")
        return {key: self.fields.raw[key] for key in keys if key in self.fields.raw}

    def adapted(self, paths: Sequence[str], layers: int | None) -> list[bool]:
        found = []
        for path in paths:
            parts = path.split(".", 3)
            counted = len(parts) == 4 and (
                self.layers <= 0 or (layers is not None and int(parts[2]) >= layers - self.layers)
            )
            found.append(path in self.keys or (counted and parts[3] in self.keys))
        return found


def read_mlx_config(fields: JsonFields, found: Sequence[str]) -> MlxConfig:
    """Check what mlx-lm reads of its configuration. ``found``: the modules that the file holds updates of.

    Raises:
        CheckpointError: a model of which all is trained, a key that is missing or of another type.
    """
    kind = fields.raw.get("fine_tune_type", "lora")
    if kind == "full":
        fields.refuse("fine_tune_type", "it is no adapter but a whole model; fuse it with mlx_lm.fuse and give that")
    if kind not in ("lora", "dora"):
        fields.refuse("fine_tune_type", "only lora and dora are supported")
    stated = fields.raw.get("lora_parameters")
    if not isinstance(stated, dict):
        fields.refuse("lora_parameters", "rank, scale and dropout are needed")
    key = "num_layers" if "num_layers" in fields.raw else "lora_layers"  # the older name
    if key == "lora_layers" and stated.get("alpha", stated.get("rank")) != stated.get("rank"):
        what = (
            "mlx-lm multiplied scale by alpha / rank until May 2024 and then no more; state scale alone, and num_layers"
        )
        fields.refuse("lora_parameters", what)
    values = JsonFields(fields.path, stated)
    r, scale, dropout = values.integer("rank"), values.number("scale", math.nan), values.number("dropout", 0.0)
    if not 1 <= r <= 1 << 16:
        values.refuse("rank", "a rank from 1 to 65536 is needed")
    keys = stated.get("keys")
    if keys is None:  # which modules are then meant differs between its releases
        keys = {path.split(".", 3)[3] if path.startswith("model.layers.") else path for path in found}
    elif not isinstance(keys, list) or not all(type(name) is str for name in keys):
        values.refuse("keys", "a list of module names is needed")
    base = fields.raw.get("model")
    plain = AdapterSpec(r, scale * r, dropout, (), False, kind)
    return MlxConfig(fields, plain, base if isinstance(base, str) else None, fields.integer(key), frozenset(keys))
