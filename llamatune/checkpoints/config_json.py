"""Hugging Face's ``config.json`` and ``generation_config.json``, read as a ``LlamaConfig`` and written. No torch.

A model that does not compute what LLaMA computes is refused, with the key that says so.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamatune.checkpoints.families import FAMILIES, biases_of, family_of, window_facts, window_of
from llamatune.checkpoints.rope_json import read_rope, rope_facts
from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.formats.safetensors import TensorLocation, same_bytes
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.strict_json import JsonFields, read_json, write_json
from llamatune.tokenizers.copied_files import copy_file

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SIZES = ("num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
_DTYPE_KEYS = ("dtype", "torch_dtype")
"""transformers 5 writes the first, transformers 4 and others read the second."""


def read_config_json(
    path: Path, tensors: dict[str, TensorLocation] | None, on_event: OnEvent = ignore_event
) -> LlamaConfig:
    """Read ``config.json`` as transformers 4 and 5 write it, and the stop tokens of ``generation_config.json``."""
    file = path / "config.json"
    facts = JsonFields(file, read_json(file))
    family = family_of(facts)
    sizes = {name: facts.integer(name) for name in _SIZES}
    heads = sizes["num_attention_heads"]
    if facts.raw.get("num_key_value_heads", 0) is not None:
        heads = facts.integer("num_key_value_heads", family.unsaid.get("num_key_value_heads", heads))
    positions = facts.integer("max_position_embeddings", family.unsaid["max_position_embeddings"])
    theta, scaling = read_rope(facts, positions)
    config = facts.build(
        LlamaConfig,
        **sizes,
        num_key_value_heads=heads,
        head_dim=facts.integer("head_dim", family.unsaid.get("head_dim", 0)),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=positions,
        tie_word_embeddings=facts.flag("tie_word_embeddings", False),
        bos_token_id=facts.integer("bos_token_id", 1),
        eos_token_ids=_stop_tokens(path, facts, on_event),
        sliding_window=window_of(facts, family, sizes["num_hidden_layers"]),
        biased_modules=biases_of(facts, family),
        head_norms=family.head_norms,
        model_type=facts.raw["model_type"],
    )
    _compare_dtypes(facts, on_event)
    if tensors is None or EMBEDDING not in tensors:
        return config
    if HEAD in tensors:
        tied = config.tie_word_embeddings and same_bytes(tensors[HEAD], tensors[EMBEDDING])
        return dataclasses.replace(config, tie_word_embeddings=tied)
    if not config.tie_word_embeddings:
        if facts.raw.get("architectures") not in (None, [], [family.architecture]):  # such as a classifier
            facts.refuse("architectures", f"{HEAD} is missing; give a {family.architecture}")
        raise CheckpointError(f"{HEAD} is missing and tie_word_embeddings is false", path, "fetch the weights again")
    return config


def write_config_json(directory: Path, config: LlamaConfig, dtype: str, source: Path | None = None) -> None:
    """Write ``config.json`` with the keys of transformers 4 and 5, and ``generation_config.json``.

    ``source``: a model whose settings of generation are kept.
    """
    family = FAMILIES[config.model_type]
    facts: dict[str, object] = {
        "architectures": [family.architecture],
        **{flag: set(modules) <= set(config.biased_modules) for flag, modules in family.flags.items()},
        **_token_facts(config),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": config.model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        **rope_facts(config),
        **window_facts(family, config.sliding_window, config.num_hidden_layers),
        "tie_word_embeddings": config.tie_word_embeddings,
        **dict.fromkeys(_DTYPE_KEYS, dtype),
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    write_json(directory / "config.json", facts)
    _write_generation_config(directory, _token_facts(config), source)


def copy_config_json(source: Path, config: LlamaConfig, directory: Path, dtype: str | None) -> None:
    """Write the configuration of the model in ``source`` again, with each value under every name that readers use.

    ``config`` is that configuration as read, or as an adapter has changed it; ``dtype`` is what the weights are cast
    to, None: no cast.
    """
    facts = read_json(source / "config.json")
    changed = dict(facts)
    for key, value in rope_facts(config).items():
        stated = facts.get(key)
        if isinstance(value, dict):
            changed[key] = {**value, **_stated(stated or {}), **{k: n for k, n in value.items() if type(n) is int}}
        elif stated is None and value is not None:
            changed[key] = value
    dtype_name = dtype or next((facts[key] for key in _DTYPE_KEYS if facts.get(key) is not None), None)
    if dtype_name is not None:
        changed |= dict.fromkeys(_DTYPE_KEYS, dtype_name)
    changed["tie_word_embeddings"] = config.tie_word_embeddings  # mlx-lm takes a missing flag for true
    changed["vocab_size"] = config.vocab_size
    for flag, modules in FAMILIES[config.model_type].flags.items():
        if set(modules) & set(config.biased_modules):
            changed[flag] = True
    if _text(changed) == _text(facts):
        copy_file(source / "config.json", directory)
    else:
        write_json(directory / "config.json", changed)
    tokens = _token_facts(config)
    if facts.get("bos_token_id", 0) is None:
        del tokens["bos_token_id"]
    _write_generation_config(directory, tokens, source)


def _text(facts: dict[str, Any]) -> str:
    """To compare by: to some readers 32.0 is not 32."""
    return json.dumps(facts, sort_keys=True)


def write_generation_config(directory: Path, config: LlamaConfig, source: Path | None = None) -> None:
    """Write ``generation_config.json``, with every EOS; ``source``: a model whose settings are kept."""
    _write_generation_config(directory, _token_facts(config), source)


def stop_tokens(directory: Path) -> tuple[int, ...]:
    """The EOS that the ``generation_config.json`` of a directory states."""
    file = directory / "generation_config.json"
    return tuple(_token_ids(file, read_json(file).get("eos_token_id")) or ()) if file.exists() else ()


def add_stop_tokens(directory: Path, more: Iterable[int]) -> None:
    """Add EOS to the ``generation_config.json`` in a staging directory."""
    file, known = directory / "generation_config.json", stop_tokens(directory)
    ids = tuple(dict.fromkeys((*known, *more)))
    if ids != known:
        facts = read_json(file)
        file.unlink()
        write_json(file, {**facts, "eos_token_id": ids[0] if len(ids) == 1 else list(ids)})


def _write_generation_config(directory: Path, tokens: dict[str, Any], source: Path | None) -> None:
    """What ``source`` states, and the ``tokens`` of the model's configuration that it does not."""
    file = None if source is None else source / "generation_config.json"
    stated = read_json(file) if file is not None and file.exists() else {}
    whole = {**tokens, **_stated(stated)}
    if file is not None and whole == stated:
        copy_file(file, directory)
    else:
        write_json(directory / "generation_config.json", whole)


def _compare_dtypes(facts: JsonFields, on_event: OnEvent) -> None:
    """A notice where the two names of the weights' dtype differ. What is read is what is stored."""
    first, second = (facts.raw.get(key) for key in _DTYPE_KEYS)
    if first is not None and second is not None and first != second:
        what = f"dtype is {first} and torch_dtype is {second}; the former is written again, as transformers reads them"
        on_event(Notice(f"{facts.path}: {what}", "warning"))


def _token_facts(config: LlamaConfig) -> dict[str, Any]:
    ends = config.eos_token_ids
    return {"bos_token_id": config.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else list(ends) or None}


def _stated(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None}


def _stop_tokens(path: Path, facts: JsonFields, on_event: OnEvent) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json where it has one, else of config.json: a number or a list.

    So transformers generates. -1 means none.
    """
    generation = path / "generation_config.json"
    homes = {generation: read_json(generation) if generation.exists() else {}, facts.path: facts.raw}
    found = {file: ids for file, raw in homes.items() if (ids := _token_ids(file, raw.get("eos_token_id"))) is not None}
    if len(found) > 1 and not found[facts.path].keys() <= found[generation].keys():
        first, second = map(list, found.values())
        what = f"generation_config.json ends texts at {first} and config.json at {second}"
        on_event(Notice(f"{path}: {what}; the former is used, as transformers does", "warning"))
    if not found:
        none_stated = all(raw.get("eos_token_id") is None for raw in homes.values())
        return (2,) if none_stated else ()
    return tuple(next(iter(found.values())))


def _token_ids(file: Path, eos: Any) -> dict[int, None] | None:
    """The ids, in their order; None: none."""
    listed = eos if isinstance(eos, list) else [eos]
    ids = [token for token in listed if token != -1]
    if eos is None or (listed and not ids):
        return None
    if not ids or not all(type(n) is int and 0 <= n < 1 << 32 for n in ids):
        raise CheckpointError(f"eos_token_id is {eos!r}", file, "a token id or a list of token ids is expected")
    return dict.fromkeys(ids)
