"""Hugging Face's ``config.json`` and ``generation_config.json``, read as a ``LlamaConfig`` and written. No torch.

A model that does not compute what LLaMA computes is refused, with the key that says so.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.formats.safetensors import TensorLocation, same_bytes
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.strict_json import JsonFields, read_json, write_json
from llamatune.tokenizers.copied_files import copy_file

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_SIZES = ("num_attention_heads", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
_DTYPE_KEYS = ("dtype", "torch_dtype")
"""transformers 5 writes the first, transformers 4 and others read the second."""


def read_config_json(path: Path, tensors: dict[str, TensorLocation] | None) -> LlamaConfig:
    """Read ``config.json`` as transformers 4 and 5 write it, and the stop tokens of ``generation_config.json``."""
    file = path / "config.json"
    facts = JsonFields(file, read_json(file))
    if facts.raw.get("model_type") != "llama":
        facts.refuse("model_type", "only 'llama' is supported")
    facts.expect("hidden_act", "silu")
    facts.expect("attention_bias", False)
    facts.expect("mlp_bias", False)
    if facts.raw.get("quantization_config") is not None:
        facts.refuse("quantization_config", "its computation is not supported")
    sizes = {name: facts.integer(name) for name in _SIZES}
    config = facts.build(
        LlamaConfig,
        **sizes,
        num_key_value_heads=facts.integer("num_key_value_heads", sizes["num_attention_heads"]),
        head_dim=facts.integer("head_dim", 0),
        rms_norm_eps=facts.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(facts),
        max_position_embeddings=facts.integer("max_position_embeddings", 2048),
        tie_word_embeddings=facts.flag("tie_word_embeddings", False),
        bos_token_id=facts.integer("bos_token_id", 1),
        eos_token_ids=_stop_tokens(path, facts),
    )
    if tensors is None or EMBEDDING not in tensors:
        return config
    if HEAD in tensors:
        tied = config.tie_word_embeddings and same_bytes(tensors[HEAD], tensors[EMBEDDING])
        return dataclasses.replace(config, tie_word_embeddings=tied)
    if not config.tie_word_embeddings:
        raise CheckpointError(f"{HEAD} is missing and tie_word_embeddings is false", path, "fetch the weights again")
    return config


def write_config_json(directory: Path, config: LlamaConfig, dtype: str) -> None:
    """Write ``config.json`` with the keys of transformers 4 and 5, and ``generation_config.json``."""
    ends = config.eos_token_ids
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else list(ends)}
    facts: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        **tokens,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        **rope_facts(config.rope_theta),
        "tie_word_embeddings": config.tie_word_embeddings,
        **dict.fromkeys(_DTYPE_KEYS, dtype),
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    write_json(directory / "config.json", facts)
    write_json(directory / "generation_config.json", tokens)


def copy_config_json(source: Path, config: LlamaConfig, directory: Path, dtype: str | None) -> None:
    """Write the configuration of the model in ``source`` again, with each value under every name that readers use.

    ``config`` is that configuration as read; ``dtype`` is what the weights are cast to, None: no cast.
    """
    facts = read_json(source / "config.json")
    stated = _stated(facts)
    rope = rope_facts(config.rope_theta)
    rope["rope_parameters"] |= _stated(stated.pop("rope_parameters", {}))
    dtype_name = stated.get("dtype", stated.get("torch_dtype"))
    names = {} if dtype_name is None else dict.fromkeys(_DTYPE_KEYS, dtype_name)
    changed = {**facts, **rope, **names, **stated}
    if dtype is not None:
        changed |= dict.fromkeys(_DTYPE_KEYS, dtype)
    changed["tie_word_embeddings"] = config.tie_word_embeddings  # mlx-lm takes a missing flag for true
    if changed == facts:
        copy_file(source / "config.json", directory)
    else:
        write_json(directory / "config.json", changed)
    if (source / "generation_config.json").exists():
        copy_file(source / "generation_config.json", directory)


def _stated(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None}


def rope_facts(theta: float) -> dict[str, Any]:
    """RoPE's theta under the keys of transformers 4, mlx-lm and Ollama, and of transformers 5."""
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}, "rope_theta": theta}


def _rope_theta(facts: JsonFields) -> float:
    """``rope_theta`` from the three keys that may hold it, which must agree.

    transformers 5 reads ``rope_scaling`` as another name of ``rope_parameters``.
    """
    homes = {"rope_theta": facts}
    for key in ("rope_parameters", "rope_scaling"):
        rope = facts.raw.get(key)
        if rope is not None:
            _refuse_scaled_rope(facts, key, rope)
            homes[f"{key}.rope_theta"] = JsonFields(facts.path, rope)
    if facts.raw.get("partial_rotary_factor") not in (None, 1.0):
        facts.refuse("partial_rotary_factor", "only 1.0 is supported: anything else computes another model")
    thetas = {
        home: fields.number("rope_theta", 0.0)
        for home, fields in homes.items()
        if fields.raw.get("rope_theta") is not None
    }
    if len(set(thetas.values())) > 1:
        what = ", ".join(f"{home} is {theta}" for home, theta in thetas.items())
        raise CheckpointError(what, facts.path, "readers differ in which one they take; keep the model's own alone")
    return next(iter(thetas.values()), 10000.0)


def _refuse_scaled_rope(facts: JsonFields, key: str, rope: Any) -> None:
    if not isinstance(rope, dict):
        facts.refuse(key, "its computation is not supported")
    for name in ("rope_type", "type"):
        if rope.get(name) not in (None, "default"):
            facts.refuse(key, f"{name} {str(rope[name])[:40]!r} is not supported, only 'default'")
    by_layer = any(isinstance(value, dict) for value in rope.values())
    if by_layer or rope.get("partial_rotary_factor") not in (None, 1.0):
        facts.refuse(key, "its computation is not supported")


def _stop_tokens(path: Path, facts: JsonFields) -> tuple[int, ...]:
    """``eos_token_id`` of generation_config.json where it has one, else of config.json: a number or a list."""
    generation = path / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    where = generation if eos is not None else facts.path
    eos = facts.raw.get("eos_token_id") if eos is None else eos
    ids = [2] if eos is None else eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(n) is int and 0 <= n < 1 << 32 for n in ids):
        raise CheckpointError(f"eos_token_id is {eos!r}", where, "a token id or a list of token ids is expected")
    return tuple(ids)
