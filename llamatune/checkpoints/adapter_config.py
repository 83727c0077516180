"""PEFT's ``adapter_config.json`` as a closed schema. No torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.llama_config import LINEAR_MODULES
from llamatune.strict_json import JsonFields, read_json

CONFIG_FILE = "adapter_config.json"
_PEFT_VERSION = "0.17.0"
"""The oldest release that has every key that we write; readers compare it with their own."""
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora",
         "init_lora_weights", "bias")  # fmt: skip
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode",
    "megatron_config", "megatron_core", "qalora_group_size", "eva_config", "runtime_config", "layers_pattern",
)  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base as it is; PiSSA, OLoRA, CorDA and LoftQ change it."""
_REASONS = {
    "modules_to_save": "it replaces whole modules of the base",
    "lora_bias": "biases are not supported",
    "rank_pattern": "one rank for all modules is supported",
    "alpha_pattern": "one alpha for all modules is supported",
    "layers_to_transform": "adapters on some of the layers are not supported",
    "fan_in_fan_out": "it means transposed weights, which LLaMA does not have",
    "alora_invocation_tokens": "activated LoRA depends on the prompt",
    "trainable_token_indices": "it replaces rows of the embedding",
}


def read_adapter_config(path: Path) -> tuple[AdapterSpec, str | None]:
    """The configuration in an adapter directory, and the base it names.

    Raises:
        CheckpointError: no adapter directory, a key that is missing, or one that plain LoRA on LLaMA cannot honour.
    """
    file = path / CONFIG_FILE
    if not path.exists():
        raise CheckpointError("no such adapter directory", path)
    if path.is_dir() and not file.exists():
        nested = path / "adapter"
        todo = f"did you mean {nested}?" if (nested / CONFIG_FILE).exists() else "give a PEFT adapter directory"
        raise CheckpointError(f"no {CONFIG_FILE} in it", path, todo)
    fields = JsonFields(file, read_json(file))
    facts, refuse = fields.raw, fields.refuse
    if facts.get("peft_type") != "LORA":
        refuse("peft_type", "only LORA adapters are supported")
    for key, value in facts.items():
        if key not in _READ and key not in _WITHOUT_EFFECT and value:
            refuse(key, _REASONS.get(key, "it is not part of plain LoRA"))
    if facts.get("bias", "none") not in ("none", None):
        refuse("bias", "biases are not supported")
    start = facts.get("init_lora_weights")
    if type(start) not in (bool, str, type(None)) or start not in _PLAIN_STARTS:
        refuse("init_lora_weights", "it changes the base itself; export the adapter as plain LoRA")
    r, alpha, dropout = facts.get("r"), facts.get("lora_alpha"), facts.get("lora_dropout", 0.0)
    if type(r) is not int or not 1 <= r <= 1 << 16:
        refuse("r", "a rank from 1 to 65536 is needed")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        refuse("lora_alpha", "a number is needed; without it the scaling would be a guess")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        refuse("lora_dropout", "a probability is needed")
    for key in ("use_rslora", "use_dora"):
        if type(facts.get(key, False)) not in (bool, type(None)):
            refuse(key, "true or false is needed")
    targets = facts.get("target_modules")
    if targets == "all-linear":
        targets = list(LINEAR_MODULES)
    if isinstance(targets, str):
        refuse("target_modules", "a pattern is not supported; list the modules")
    if not isinstance(targets, list) or not targets or not all(type(name) is str for name in targets):
        refuse("target_modules", "a list of module names is needed")
    if not set(targets) <= set(LINEAR_MODULES) or len(set(targets)) != len(targets):
        refuse("target_modules", f"each of {', '.join(LINEAR_MODULES)} may appear once, nothing else")
    base = facts.get("base_model_name_or_path")
    kind = "dora" if facts.get("use_dora") else "lora"
    config = AdapterSpec(r, float(alpha), float(dropout), tuple(targets), bool(facts.get("use_rslora")), kind)
    return config, base if isinstance(base, str) else None


def dump_config(config: AdapterSpec, base_path: str | None) -> dict[str, Any]:
    """The keys that PEFT, transformers, vLLM and llama.cpp read."""
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": _PEFT_VERSION,
        "r": config.r,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(config.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": config.kind == "dora",
        "use_rslora": config.use_rslora,
    }
