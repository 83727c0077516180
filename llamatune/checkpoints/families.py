"""The models that share LLaMA's computation, by ``model_type``: defaults and differences of each. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llamatune.shapes.llama_config import ATTENTION_MODULES, FEED_FORWARD_MODULES, QKV_MODULES
from llamatune.strict_json import JsonFields


@dataclass(frozen=True)
class Family:
    """What differs between kinds of model.

    ``unsaid``: the values of keys that a configuration does not hold, as transformers has them. ``flags``: the modules
    to which a true flag adds a bias. ``biases``: those that always have one. ``head_norms`` as in ``LlamaConfig``.
    """

    architecture: str
    unsaid: dict[str, Any] = field(default_factory=dict)
    flags: dict[str, tuple[str, ...]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    head_norms: bool = False


_BIAS: dict[str, tuple[str, ...]] = {"attention_bias": ATTENTION_MODULES}
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_FULL, _SLIDING = "full_attention", "sliding_attention"

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", {"max_position_embeddings": 2048},
                    {**_BIAS, "mlp_bias": FEED_FORWARD_MODULES}),
    "mistral": Family("MistralForCausalLM", {"max_position_embeddings": 131072, "num_key_value_heads": 8,
                                             "sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, biases=QKV_MODULES),
    "qwen3": Family("Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, _BIAS, head_norms=True),
}  # fmt: skip

_OTHERS = {
    "gemma": "it scales the embedding, adds 1 to the weights of norms and uses GELU",
    "gemma2": "it has norms behind each half, soft caps on logits and windows in some layers",
    "gemma3_text": "it has norms behind each half, norms of heads and windows in some layers",
    "phi": "it has LayerNorm, a parallel feed-forward and rotates a part of each head",
    "phi3": "it stores q, k, v and gate, up as one matrix each",
    "mixtral": "it has several experts in each block",
    "qwen2_moe": "it has several experts in each block",
    "qwen3_moe": "it has several experts in each block",
    "llama4": "it has several experts in each block and layers without rotation",
    "llama4_text": "it has several experts in each block and layers without rotation",
    "mllama": "it has an image encoder and cross-attention; its text model alone is not stored as one",
    "deepseek_v3": "it has latent attention and several experts in each block",
    "smollm3": "some of its layers have no rotation",
    "ministral": "it has windows in some layers",
    "olmo2": "it has norms behind each half",
    "granite": "it scales the embedding, residuals, attention and logits",
    "cohere": "it has LayerNorm, a parallel feed-forward and scaled logits",
    "stablelm": "it has LayerNorm and rotates a part of each head",
    "falcon": "it has LayerNorm and a parallel feed-forward",
    "gpt2": "it has LayerNorm, learned positions and no rotation",
    "gpt_neox": "it has LayerNorm and a parallel feed-forward",
    "apertus": "it has another activation without a gate and norms of heads",
    "arcee": "its feed-forward has no gate and uses squared ReLU",
    "bitnet": "it has ternary weights and norms within each half",
    "cohere2": "it has LayerNorm, a parallel feed-forward and layers without rotation",
    "deepseek_v2": "it has latent attention and several experts in each block",
    "exaone4": "it has norms behind each half, and windows or no rotation in some layers",
    "glm": "it stores gate, up as one matrix and rotates a part of each head",
    "glm4": "it has norms behind each half and rotates a part of each head",
    "gpt_oss": "it has several experts in each block, attention sinks and windows in some layers",
    "helium": "it rotates neighbours in each head",
    "hunyuan_v1_dense": "it has norms of heads behind the rotation",
    "ministral3": "it scales queries by their position",
    "nemotron": "it has LayerNorm and squared ReLU without a gate, and rotates a part of each head",
    "olmo": "it has LayerNorm without weights",
    "olmo3": "it has norms behind each half and windows in some layers",
    "qwen3_next": "it has linear attention in some layers and several experts in each block",
    "seed_oss": "it has biases of q, k, v and o under flags of its own",
    "starcoder2": "it has LayerNorm, and a feed-forward with GELU and without a gate",
}
_UNKNOWN = "what it computes is not known here"


def family_of(facts: JsonFields) -> Family:
    """The entry of a configuration; any other model is refused with what differs."""
    kind = str(facts.raw.get("model_type"))
    if kind not in FAMILIES:
        facts.refuse("model_type", f"{_OTHERS.get(kind, _UNKNOWN)}; supported are {', '.join(FAMILIES)}")
    _refuse_additions(facts)
    return FAMILIES[kind]


def _refuse_additions(facts: JsonFields) -> None:
    """Refuse what makes another model of one of a known kind."""
    if facts.raw.get("hidden_act") != "swish":  # another name of SiLU
        facts.expect("hidden_act", "silu")
    if facts.raw.get("quantization_config") is not None:
        facts.refuse("quantization_config", "quantised weights are not read; give the model that it was made from")
    if facts.raw.get("num_local_experts") not in (None, 0, 1):
        facts.refuse("num_local_experts", "several experts are not supported")


def window_of(facts: JsonFields, family: Family, layers: int) -> int | None:
    """The sliding window of every layer, None: none. Windows in some layers only are refused.

    Mistral has one unless it is null. Qwen has one if a flag is true, in the layers listed or from one of them on.
    """
    key, kinds, unsaid = "layer_types", _kinds_of_layers(facts), family.unsaid
    flagged, window = "max_window_layers" in unsaid, None
    if facts.raw.get("sliding_window", 0) is not None and "sliding_window" in unsaid:
        window = facts.integer("sliding_window", unsaid["sliding_window"])
    if flagged and not facts.flag("use_sliding_window", False):
        window = None
    elif facts.raw.get("use_sliding_window") and not flagged and window is None:
        facts.refuse("use_sliding_window", "this model has no window")
    if flagged and window is not None and not kinds:
        key, first = "max_window_layers", facts.integer("max_window_layers", unsaid["max_window_layers"])
        kinds = [_SLIDING if layer >= first else _FULL for layer in range(layers)]
    slides = _SLIDING in kinds
    if slides and _FULL in kinds:
        facts.refuse(key, "windows in some layers only are not supported")
    if slides and window is None:
        facts.refuse(key, "this model has no window; take the key out, or state the window that it was trained with")
    return window if slides or not flagged else None


def window_facts(family: Family, window: int | None, layers: int) -> dict[str, Any]:
    """The sliding window under the keys that ``window_of`` reads."""
    if "sliding_window" not in family.unsaid:
        return {}
    if "max_window_layers" not in family.unsaid:
        return {"sliding_window": window}
    first = layers if window is None else 0
    return {"max_window_layers": first, "sliding_window": window, "use_sliding_window": window is not None}


def _kinds_of_layers(facts: JsonFields) -> list[str]:
    """What each layer attends to; empty where a configuration does not say it."""
    kinds = facts.raw.get("layer_types")
    if kinds is None:
        return []
    if not isinstance(kinds, list) or any(kind not in (_FULL, _SLIDING) for kind in kinds):
        facts.refuse("layer_types", f"a list of {_FULL!r} is expected, or of {_SLIDING!r}")
    return kinds


def biases_of(facts: JsonFields, family: Family) -> tuple[str, ...]:
    """The modules with a bias."""
    flagged = [modules for flag, modules in family.flags.items() if facts.flag(flag, False)]
    return (*family.biases, *(module for modules in flagged for module in modules))
