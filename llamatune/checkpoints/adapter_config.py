"""PEFT's ``adapter_config.json``, read as PEFT 0.21 reads it, and written. No torch.

PEFT itself loads an adapter without ``lora_alpha``, or with other modules than its file, and silently computes
something else. Here the file's tensors say what is adapted, and what the configuration says of them must agree.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamatune.checkpoints.adapter_patterns import matches
from llamatune.shapes.adapter import ADAPTER_KINDS, AdapterSpec
from llamatune.strict_json import JsonFields

CONFIG_FILE = "adapter_config.json"
_LARGEST_FP32 = (2 - 2**-23) * 2.0**127
_PEFT_VERSION = "0.17.0"
"""The oldest release that has every key that we write; readers compare it with their own."""
_TARGETING = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "modules_to_save",
    "trainable_token_indices", "lora_bias",
)  # fmt: skip
_READ = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights",
    "bias", "ensure_weight_tying", *_TARGETING,
)  # fmt: skip
_WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode",
    "megatron_config", "megatron_core", "qalora_group_size", "eva_config", "corda_config", "lora_ga_config",
    "loftq_config", "runtime_config", "merge_weights",
)  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of ``init_lora_weights`` that leave the base as it is; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change it."""
_REASONS = {
    "layer_replication": "it makes a model with more layers than its base",
    "fan_in_fan_out": "it means transposed weights, which LLaMA does not have",
    "alora_invocation_tokens": "activated LoRA depends on the prompt",
    "use_qalora": "QALoRA pools the inputs of a quantised base",
    "target_parameters": "it adapts the experts of other models",
    "enable_lora": "it means q, k and v in one matrix, which LLaMA does not have",
}
_SAVED_AS = {"norm": "model.norm"}
"""What PEFT calls a module that is trained whole: to it, ``norm`` would be every module whose name ends so."""
_LARGEST_RANK = 1 << 16
_SEVEN_OF_BLOCKS = "model.layers."


@dataclass(frozen=True)
class AdapterConfig(ABC):
    """What a configuration says of an adapter; modules are named by their paths, ``model.layers.0.mlp.up_proj``.

    ``plain`` are kind, dropout and what holds for modules of which nothing else is said, without target modules.
    ``base`` is the base as the configuration names it.
    """

    fields: JsonFields
    plain: AdapterSpec
    base: str | None

    @property
    @abstractmethod
    def stated(self) -> dict[str, Any]:
        """The keys that say what is adapted."""

    @property
    @abstractmethod
    def tied(self) -> bool:
        """Whether the head follows the embedding where the base ties the two."""

    @abstractmethod
    def adapted(self, paths: Sequence[str], layers: int | None) -> list[bool]:
        """Which modules have a low-rank update, in a base of so many layers; None: in whatever base has them."""

    def ranks(self, paths: Sequence[str]) -> list[int]:
        return [self.plain.r] * len(paths)

    def alphas(self, paths: Sequence[str]) -> list[float]:
        return [self.plain.alpha] * len(paths)

    def saved(self, paths: Sequence[str]) -> list[bool]:
        """Which modules the file holds whole."""
        return [False] * len(paths)

    def tokens(self, path: str) -> tuple[int, ...]:
        """The rows that the file holds of a module's weight."""
        return ()

    @property
    def bias(self) -> bool:
        """Whether the file may hold biases of the base."""
        return False


@dataclass(frozen=True)
class PeftConfig(AdapterConfig):
    """``adapter_config.json`` of PEFT 0.2 to 0.21."""

    @property
    def bias(self) -> bool:
        return self.fields.raw.get("bias") in ("all", "lora_only")

    @property
    def tied(self) -> bool:
        return bool(self.fields.raw.get("ensure_weight_tying"))

    @property
    def stated(self) -> dict[str, Any]:
        return {key: self.fields.raw[key] for key in ("r", *_TARGETING) if self.fields.raw.get(key)}

    def adapted(self, paths: Sequence[str], layers: int | None) -> list[bool]:
        found = self._targeted(paths)
        for key in ("exclude_modules", "modules_to_save"):
            if value := self.fields.raw.get(key):
                if key == "modules_to_save":
                    rows = matches(self.fields, key, value, paths, r"(^|.*\.)({})($|\..*)")
                else:
                    rows = [_named(value, paths) if isinstance(value, list) else self._pattern(key, paths)]
                found = [hit and not any(column) for hit, *column in zip(found, *rows, strict=True)]
        return found

    def ranks(self, paths: Sequence[str]) -> list[int]:
        return self._by_pattern("rank_pattern", self.plain.r, paths)

    def alphas(self, paths: Sequence[str]) -> list[float]:
        return self._by_pattern("alpha_pattern", self.plain.alpha, paths)

    def saved(self, paths: Sequence[str]) -> list[bool]:
        names = tuple(self.fields.raw.get("modules_to_save") or ())
        parents = [[path.rsplit(".", n)[0] for n in range(path.count(".") + 1)] for path in paths]
        return [bool(names) and any(parent.endswith(names) for parent in above) for above in parents]

    def tokens(self, path: str) -> tuple[int, ...]:
        stated = self.fields.raw.get("trainable_token_indices") or {}
        by_module = {"embed_tokens": stated} if isinstance(stated, list) else stated
        return next((tuple(rows) for module, rows in by_module.items() if path.endswith(module)), ())

    def _targeted(self, paths: Sequence[str]) -> list[bool]:
        raw = self.fields.raw
        targets = raw["target_modules"]
        if isinstance(targets, str):
            if targets.lower() == "all-linear":
                return [path.startswith(_SEVEN_OF_BLOCKS) for path in paths]
            return self._pattern("target_modules", paths)
        found = _named(targets, paths)
        layers, patterns = raw.get("layers_to_transform"), raw.get("layers_pattern") or ["layers"]
        if layers is None or layers == []:
            return found
        patterns = [patterns] if isinstance(patterns, str) else patterns
        rows = matches(self.fields, "layers_pattern", patterns, paths, r"(?:^|.*?\.)(?:{})\.\d+\.")
        wanted = layers if isinstance(layers, list) else [layers]
        return [
            hit and any(column) and int(path.split(".")[2]) in wanted
            for hit, path, *column in zip(found, paths, *rows, strict=True)
        ]

    def _pattern(self, key: str, paths: Sequence[str]) -> list[bool]:
        return matches(self.fields, key, [self.fields.raw[key]], paths)[0]

    def _by_pattern(self, key: str, plain: Any, paths: Sequence[str]) -> list[Any]:
        stated = self.fields.raw.get(key) or {}
        rows = matches(self.fields, key, list(stated), paths, r"(.*\.)?({})$")
        columns = zip(*rows, strict=True) if rows else [()] * len(paths)
        values = list(stated.values())
        return [next(itertools.compress(values, column), plain) for column in columns]


def read_peft_config(fields: JsonFields) -> PeftConfig:
    """Check every key.

    Raises:
        CheckpointError: a key that is missing or of another type, or one that LoRA on LLaMA cannot honour.
    """
    raw, refuse = fields.raw, fields.refuse
    if raw.get("peft_type") != "LORA":
        refuse("peft_type", "only LORA adapters are supported")
    for key, value in raw.items():
        if key not in _READ and key not in _WITHOUT_EFFECT and value:
            refuse(key, _REASONS.get(key, "it is not part of plain LoRA"))
    start = raw.get("init_lora_weights")
    if type(start) not in (bool, str, type(None)) or start not in _PLAIN_STARTS:
        refuse("init_lora_weights", "it changes the base itself; export the adapter as plain LoRA")
    if type(raw.get("r")) is not int or not 1 <= raw["r"] <= _LARGEST_RANK:
        refuse("r", f"a rank from 1 to {_LARGEST_RANK} is needed")
    if not _is_number(raw.get("lora_alpha")):
        refuse("lora_alpha", "a number is needed; without it the scaling would be a guess")
    dropout = raw.get("lora_dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout <= 1:
        refuse("lora_dropout", "a probability is needed")
    for key in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
        if type(raw.get(key, False)) not in (bool, type(None)):
            refuse(key, "true or false is needed")
    if raw.get("bias", "none") not in ("none", None, "all", "lora_only"):
        refuse("bias", "none, all or lora_only is needed")
    kind = "dora" if raw.get("use_dora") else "lora"
    if kind not in ADAPTER_KINDS:
        refuse("use_dora", "DoRA also rescales the columns of the base")
    _check_modules(fields)
    _check_patterns(fields)
    _check_tokens(fields)
    base = raw.get("base_model_name_or_path")
    plain = AdapterSpec(raw["r"], float(raw["lora_alpha"]), float(dropout), (), bool(raw.get("use_rslora")), kind)
    return PeftConfig(fields, plain, base if isinstance(base, str) else None)


def _check_modules(fields: JsonFields) -> None:
    raw, refuse = fields.raw, fields.refuse
    targets = raw.get("target_modules")
    if not targets or (not isinstance(targets, str) and not _are_names(targets)):
        refuse("target_modules", "a list of module names or a pattern is needed")
    if not isinstance(raw.get("exclude_modules") or [], str) and not _are_names(raw.get("exclude_modules") or []):
        refuse("exclude_modules", "a list of module names or a pattern is needed")
    if not _are_names(raw.get("modules_to_save") or []):
        refuse("modules_to_save", "a list of module names is needed")
    layers, patterns = raw.get("layers_to_transform"), raw.get("layers_pattern") or []
    wanted = layers if isinstance(layers, list) else [layers]
    if layers is not None and not all(type(layer) is int and layer >= 0 for layer in wanted):
        refuse("layers_to_transform", "a number or a list of numbers is needed")
    if not isinstance(patterns, str) and not _are_names(patterns):
        refuse("layers_pattern", "a name or a list of names is needed")
    if isinstance(targets, str) and layers is not None:
        refuse("layers_to_transform", "it has no meaning beside a pattern in target_modules")


def _check_patterns(fields: JsonFields) -> None:
    ranks, alphas = (fields.raw.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
    if not isinstance(ranks, dict) or not all(type(r) is int and 1 <= r <= _LARGEST_RANK for r in ranks.values()):
        fields.refuse("rank_pattern", f"a rank from 1 to {_LARGEST_RANK} of each module is needed")
    if not isinstance(alphas, dict) or not all(map(_is_number, alphas.values())):
        fields.refuse("alpha_pattern", "a number for each module is needed")


def _check_tokens(fields: JsonFields) -> None:
    stated = fields.raw.get("trainable_token_indices") or {}
    rows = list(stated.values()) if isinstance(stated, dict) else [stated]
    for ids in rows:
        if not isinstance(ids, list) or not all(type(n) is int and n >= 0 for n in ids) or len(set(ids)) < len(ids):
            fields.refuse("trainable_token_indices", "ids of tokens are needed, each once")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(type(name) is str for name in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST_FP32


def _named(names: Sequence[str], paths: Sequence[str]) -> list[bool]:
    """Which paths are one of the names, or end with one behind a dot."""
    ends = tuple(f".{name}" for name in names)
    return [path in names or path.endswith(ends) for path in paths]


def dump_config(config: AdapterSpec, base_path: str | None) -> dict[str, Any]:
    """The keys that PEFT, transformers, vLLM and llama.cpp read."""
    return {
        "alpha_pattern": {module: _number(alpha) for module, alpha in config.module_alphas},
        "base_model_name_or_path": base_path,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _number(config.alpha),
        "lora_dropout": config.dropout,
        "modules_to_save": [_SAVED_AS.get(module, module) for module in config.whole] or None,
        "peft_type": "LORA",
        "peft_version": _PEFT_VERSION,
        "r": config.r,
        "rank_pattern": dict(config.module_ranks),
        "revision": None,
        "target_modules": list(config.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": config.kind == "dora",
        "use_rslora": config.use_rslora,
    }


def _number(value: float) -> int | float:
    """A whole number as an integer, which is what some readers take alpha for."""
    return int(value) if float(value).is_integer() else value
