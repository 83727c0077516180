"""A model's configuration in the metadata of a GGUF file, read as a ``LlamaConfig`` and written. No torch.

llama.cpp has an architecture for each family; Mistral's is ``llama``. Llama 3.1's scaling of rope is no metadata but a
tensor, by whose elements the wave lengths are multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llamatune.checkpoints.families import FAMILIES
from llamatune.errors import CheckpointError
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig, linear_path
from llamatune.shapes.rope_scaling import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from llamatune.strict_json import JsonFields

ROPE_FACTORS = "rope_freqs.weight"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
INTERLEAVED = ("llama",)
"""The architectures whose rows of q and k are stored as interleaved pairs."""
_WHOLE = {
    "model.embed_tokens.weight": EMBEDDING, "model.norm.weight": "output_norm.weight", "lm_head.weight": HEAD,
}  # fmt: skip
_IN_BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down", "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_BIASED = {module: _IN_BLOCK[linear_path(module)] for module in LINEAR_MODULES}
_READ = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow", "rope.scale_linear",
)  # fmt: skip
_WITHOUT_EFFECT = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "attention.causal")
_LOW, _HIGH = 1.0, 4.0
"""Llama 3.1's factors of low and high frequencies, which no model has otherwise and the file does not state."""


def gguf_name(name: str) -> str:
    """llama.cpp's name: ``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    if name in _WHOLE:
        return _WHOLE[name]
    stem, _, kind = name.rpartition(".")
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{_IN_BLOCK[module]}.{kind}"


def architecture_of(config: LlamaConfig) -> str:
    """llama.cpp's architecture that computes the model."""
    return _ARCHITECTURES[config.model_type]


def is_interleaved(config: LlamaConfig) -> bool:
    """Whether the rows of q and k are stored as interleaved pairs."""
    return architecture_of(config) in INTERLEAVED


def config_metadata(config: LlamaConfig) -> dict[str, tuple[str, Any]]:
    """The keys that llama.cpp reads; ``CheckpointError`` for a rope type that it cannot compute."""
    arch, scaling = architecture_of(config), config.rope_scaling
    facts: dict[str, tuple[str, Any]] = {
        "block_count": ("u32", config.num_hidden_layers),
        "context_length": ("u32", config.max_position_embeddings),
        "embedding_length": ("u32", config.hidden_size),
        "feed_forward_length": ("u32", config.intermediate_size),
        "attention.head_count": ("u32", config.num_attention_heads),
        "attention.head_count_kv": ("u32", config.num_key_value_heads),
        "attention.layer_norm_rms_epsilon": ("f32", config.rms_norm_eps),
        "attention.key_length": ("u32", config.head_dim),
        "attention.value_length": ("u32", config.head_dim),
        "rope.freq_base": ("f32", config.rope_theta),
        "rope.dimension_count": ("u32", config.head_dim),
        "vocab_size": ("u32", config.vocab_size),
    }
    if config.sliding_window is not None:
        facts["attention.sliding_window"] = ("u32", config.sliding_window)
    match scaling:
        case None:
            pass
        case LinearScaling():
            facts |= {"rope.scaling.type": ("str", "linear"), "rope.scaling.factor": ("f32", scaling.factor)}
        case Llama3Scaling():
            original = scaling.original_max_position_embeddings
            facts["rope.scaling.original_context_length"] = ("u32", original)
        case YarnScaling():
            facts |= {
                "rope.scaling.type": ("str", "yarn"),
                "rope.scaling.factor": ("f32", scaling.factor),
                "rope.scaling.original_context_length": ("u32", scaling.original_max_position_embeddings),
            }
            usual = YarnScaling(scaling.factor, 1).attention_scale  # llama.cpp multiplies by it on its own
            optional = {
                "attn_factor": None if scaling.attention_scale == usual else scaling.attention_scale / usual,
                "yarn_beta_fast": scaling.beta_fast,
                "yarn_beta_slow": scaling.beta_slow,
            }
            facts |= {f"rope.scaling.{key}": ("f32", value) for key, value in optional.items() if value is not None}
        case _:
            what = f"the rope type {scaling.kind!r}, which llama.cpp does not compute"
            raise CheckpointError(what, None, "choose --format hf")
    return {"general.architecture": ("str", arch)} | {f"{arch}.{key}": value for key, value in facts.items()}


def rope_factors(config: LlamaConfig) -> list[float] | None:
    """``rope_freqs.weight``, (E/2,): by how much each pair's wave is stretched; None: there is no such tensor."""
    if not isinstance(config.rope_scaling, Llama3Scaling):
        return None
    scaling, kept = config.rope_scaling, _kept(config.head_dim, config.rope_theta, config.rope_scaling)
    return [1 / ((1 - share) / scaling.factor + share) for share in kept]


def _kept(head_dim: int, theta: float, scaling: Llama3Scaling) -> list[float]:
    """How much of each pair's frequency stays as it is, from 0 to 1 (``apply_scaling`` of Llama 3.1)."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    within = scaling.original_max_position_embeddings / (2 * math.pi)
    turns = (within * theta ** (-dimension / head_dim) for dimension in range(0, head_dim, 2))
    return [min(1.0, max(0.0, (count - low) / (high - low))) for count in turns]


def read_gguf_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    factors: Sequence[float] | None,
    path: Path,
) -> LlamaConfig:
    """The configuration. Vocabulary, biases and a tied head come from the tensors' ``shapes``.

    ``factors``: the elements of ``rope_freqs.weight``, if there is one.

    Raises:
        CheckpointError: another architecture, or a key that makes another model of a known one, by name.
    """
    general = JsonFields(path, dict(metadata))
    arch = metadata.get("general.architecture")
    if arch not in _ARCHITECTURES.values() or not isinstance(arch, str):
        general.refuse("general.architecture", f"supported are {', '.join(dict.fromkeys(_ARCHITECTURES.values()))}")
    kind = metadata.get("general.type", "model")
    if kind != "model":
        general.refuse("general.type", "an adapter goes to convert-adapter" if kind == "adapter" else "no model")
    if metadata.get("split.count", 0) not in (0, 1):
        general.refuse("split.count", "join the parts with llama-gguf-split --merge first")
    named = {key: value for key, value in metadata.items() if key.startswith(f"{arch}.")}
    facts = JsonFields(path, {key.removeprefix(f"{arch}."): value for key, value in named.items()})
    for key, value in facts.raw.items():
        if key not in _READ and key not in _WITHOUT_EFFECT and value:
            facts.refuse(key, "it makes another model than those that are supported")
    if facts.raw.get("attention.causal") is False:
        facts.refuse("attention.causal", "a model that generates is expected")
    embedding = shapes.get(EMBEDDING)
    if embedding is None or len(embedding) != 2:
        raise CheckpointError(f"no matrix {EMBEDDING}", path, "fetch it again")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) != embedding[0]:
        raise CheckpointError(f"{len(tokens)} tokens for {embedding[0]} rows of {EMBEDDING}", path, "fetch it again")
    width, heads = facts.integer("embedding_length"), facts.integer("attention.head_count")
    head_dim = facts.integer("attention.key_length", width // max(1, heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        facts.expect(key, head_dim)
    window = facts.integer("attention.sliding_window", 0) or None
    model_type = "mistral" if arch == "llama" and window is not None else arch
    theta = facts.number("rope.freq_base", 10000.0)
    if not 1 <= theta < 1e12:
        facts.refuse("rope.freq_base", "no model has it")
    return facts.build(
        LlamaConfig,
        hidden_size=width,
        intermediate_size=facts.integer("feed_forward_length"),
        num_hidden_layers=facts.integer("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=facts.integer("attention.head_count_kv", heads),
        vocab_size=embedding[0],
        head_dim=head_dim,
        rms_norm_eps=facts.number("attention.layer_norm_rms_epsilon", 1e-5),
        rope_theta=theta,
        rope_scaling=_scaling(facts, head_dim, theta, factors),
        sliding_window=window,
        max_position_embeddings=facts.integer("context_length"),
        tie_word_embeddings=HEAD not in shapes,
        biased_modules=_biases(shapes, model_type, path),
        head_norms=FAMILIES[model_type].head_norms,
        model_type=model_type,
        bos_token_id=general.integer("tokenizer.ggml.bos_token_id", 1),
        eos_token_ids=end_tokens(general),
    )


def end_tokens(general: JsonFields) -> tuple[int, ...]:
    """The tokens that end a text or a turn."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    found = dict.fromkeys(general.integer(key) for key in keys if general.raw.get(key) is not None)
    return tuple(found) or (2,)


def _biases(shapes: Mapping[str, tuple[int, ...]], model_type: str, path: Path) -> tuple[str, ...]:
    found = {module for module, name in _BIASED.items() if f"blk.0.{name}.bias" in shapes}
    family = FAMILIES[model_type]
    flagged = [modules for modules in family.flags.values() if set(modules) <= found]
    stated = (*family.biases, *(module for modules in flagged for module in modules))
    if set(stated) != found:
        what = f"a bias in {', '.join(sorted(found)) or 'no layer'}, which no configuration of {model_type} states"
        raise CheckpointError(what, path, "use the safetensors files of the model")
    return stated


def _scaling(facts: JsonFields, head_dim: int, theta: float, factors: Sequence[float] | None) -> RopeScaling | None:
    kind = facts.raw.get("rope.scaling.type", "linear")
    factor = facts.number("rope.scaling.factor", facts.number("rope.scale_linear", 0.0)) or 1.0
    if factors is not None:
        if kind == "yarn" or (kind == "linear" and factor != 1):
            facts.refuse("rope.scaling.type", f"there is {ROPE_FACTORS} too; both together are not supported")
        return _llama3(facts, head_dim, theta, factors)
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind == "linear":
        return facts.build(LinearScaling, factor=factor)
    if kind != "yarn":
        facts.refuse("rope.scaling.type", "known are none, linear and yarn")
    optional = {
        key: facts.number(f"rope.scaling.yarn_{key}", 0.0) if f"rope.scaling.yarn_{key}" in facts.raw else None
        for key in ("beta_fast", "beta_slow")
    }
    scaling = facts.build(
        YarnScaling, factor=factor, attention_factor=None, **optional,
        original_max_position_embeddings=facts.integer("rope.scaling.original_context_length"),
    )  # fmt: skip
    if "rope.scaling.attn_factor" not in facts.raw:
        return scaling
    scale = facts.number("rope.scaling.attn_factor", 1.0) * scaling.attention_scale
    return facts.build(YarnScaling, **{**scaling.facts(), "attention_factor": float(f"{scale:.6g}")})


def _llama3(facts: JsonFields, head_dim: int, theta: float, factors: Sequence[float]) -> Llama3Scaling | None:
    """The scaling that gives these factors; None: they are all 1."""
    if len(factors) != head_dim // 2 or not all(1 - 1e-4 <= factor < 1e6 for factor in factors):
        raise CheckpointError(f"{ROPE_FACTORS} is malformed", facts.path, "fetch it again")
    if max(factors) < 1 + 1e-4:
        return None
    stated = facts.integer("rope.scaling.original_context_length", 8192)
    for original in (stated, *(1 << power for power in range(8, 21))):
        kept = _kept(head_dim, theta, Llama3Scaling(1.0, _LOW, _HIGH, original))
        largest = max(range(len(factors)), key=factors.__getitem__)
        rest = 1 / factors[largest] - kept[largest]
        if kept[largest] == 1 or rest <= 0:
            continue
        factor = float(f"{(1 - kept[largest]) / rest:.6g}")
        wanted = (1 / ((1 - share) / factor + share) for share in kept)
        if all(abs(got - want) <= 1e-4 * want for got, want in zip(factors, wanted, strict=True)):
            return facts.build(
                Llama3Scaling, factor=factor, low_freq_factor=_LOW, high_freq_factor=_HIGH,
                original_max_position_embeddings=original,
            )  # fmt: skip
    raise CheckpointError(f"{ROPE_FACTORS} is not of Llama 3.1's rule", facts.path, "use its safetensors files")
