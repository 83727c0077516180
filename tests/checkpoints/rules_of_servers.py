"""What vLLM, Text Generation Inference (TGI) and Ollama ask of a model or an adapter directory, as their sources say.

Ollama reads JSON into Go's types: a whole number must be written without a fraction. vLLM and TGI read a model's
configuration through transformers, TGI that of release 4.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import sentencepiece
from safetensors import safe_open

MODULES = {
    "q_proj": ("self_attn", "attn_q"), "k_proj": ("self_attn", "attn_k"), "v_proj": ("self_attn", "attn_v"),
    "o_proj": ("self_attn", "attn_output"), "gate_proj": ("mlp", "ffn_gate"), "up_proj": ("mlp", "ffn_up"),
    "down_proj": ("mlp", "ffn_down"),
}  # fmt: skip
_WHOLE = ("vocab_size", "num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size",
          "num_attention_heads", "num_key_value_heads", "head_dim")  # fmt: skip
_LORA_NAME = re.compile(r"base_model\.model\.(model\.layers\.\d+\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])\.weight")
VLLM_LARGEST_RANK = 16
"""Without --max-lora-rank."""


def read(path: Path) -> dict[str, Any]:
    """A JSON object."""
    facts: dict[str, Any] = json.loads(path.read_text())
    return facts


def shapes_of(directory: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of every tensor in every safetensors file: all servers read all files of that name."""
    found = {}
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                assert name not in found, f"two tensors are called {name}"
                found[name] = (part.get_dtype(), part.get_shape())
    return found


def check_ollama_model(directory: Path, theta: float, scaling: dict[str, Any] | None = None) -> None:
    """``scaling``: what its ``rope_scaling`` must say at least."""
    facts = read(directory / "config.json")
    assert facts["architectures"][0] in ("LlamaForCausalLM", "Qwen2ForCausalLM")
    assert all(type(facts[key]) is int for key in _WHOLE)
    assert facts["rope_theta"] == theta
    rope = facts.get("rope_scaling") or {}
    for key, value in (scaling or {}).items():
        assert (rope[key], type(rope[key])) == (value, type(value)), key
    if scaling is None:
        assert rope.get("type") in (None, "default")
    tensors = shapes_of(directory)
    assert all(dtype in ("F32", "F16", "BF16") and shape for dtype, shape in tensors.values())
    _check_ollama_tokenizer(directory)


def _check_ollama_tokenizer(directory: Path) -> None:
    """``tokenizer.model`` goes before ``tokenizer.json`` and must be SentencePiece's."""
    model, definition = directory / "tokenizer.model", directory / "tokenizer.json"
    if model.exists():
        size = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
        added = directory / "added_tokens.json"
        ids = sorted(read(added).values()) if added.exists() else []
        assert ids == list(range(size, size + len(ids)))
    else:
        facts = read(definition)["model"]
        assert facts["vocab"]
        assert isinstance(facts["merges"], list)


def check_ollama_chat(directory: Path, template: str) -> None:
    """Its converter reads the template in ``tokenizer_config.json`` alone: one text, or several with names."""
    stated = read(directory / "tokenizer_config.json")["chat_template"]
    if isinstance(stated, list):
        stated = next(entry["template"] for entry in stated if entry["name"] == "default")
    assert stated == template


def check_tgi_model(directory: Path, theta: float, kind: str = "default") -> None:
    """Read as transformers 4 does, which knows neither ``rope_parameters`` nor ``dtype``."""
    facts = read(directory / "config.json")
    assert facts["rope_theta"] == theta
    rope = facts.get("rope_scaling") or {}
    for key in ("rope_type", "type"):  # one branch reads the first, another the second
        assert rope.get(key, "default") == kind
    needed = {"llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
              "yarn": ("factor", "original_max_position_embeddings"), "linear": ("factor",)}  # fmt: skip
    assert all(rope[key] > 0 for key in needed.get(kind, ()))
    assert facts["torch_dtype"] in ("float32", "float16", "bfloat16")
    head = "lm_head.weight" in shapes_of(directory)
    assert facts["tie_word_embeddings"] is not head
    for path in directory.glob("*.safetensors"):
        assert not any(word in path.name for word in ("arguments", "args", "adapter", "training"))


def check_vllm_adapter(directory: Path, rank: int = VLLM_LARGEST_RANK) -> None:
    """The three keys that it needs, nothing that it refuses, and names of modules that it has."""
    facts = read(directory / "adapter_config.json")
    assert {"r", "lora_alpha", "target_modules"} <= facts.keys()
    assert facts["r"] <= rank
    assert not facts.get("modules_to_save")
    assert not facts.get("use_dora")
    assert facts.get("bias", "none") == "none"
    for name in shapes_of(directory):
        match = _LORA_NAME.fullmatch(name)
        assert match, name
        assert match[2] in MODULES
    assert (directory / "adapter_model.safetensors").exists()


def check_tgi_adapter(directory: Path, layers: int) -> None:
    """A kind of module is adapted where all layers have it: it leaves out the whole kind otherwise."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(directory))
    tensors = shapes_of(directory)
    expected = {
        f"base_model.model.model.layers.{layer}.{MODULES[module][0]}.{module}.lora_{which}.weight"
        for layer in range(layers)
        for module in config.target_modules
        for which in "AB"
    }
    assert tensors.keys() == expected
    ranks = {shape[0] for name, (_, shape) in tensors.items() if ".lora_A." in name}
    assert ranks == {config.r}, "one rank and one alpha are read"


def check_ollama_adapter(directory: Path) -> None:
    """A whole alpha, and A and B the way PEFT has them: it takes an A of more rows than columns for mlx-lm's."""
    assert type(read(directory / "adapter_config.json")["lora_alpha"]) is int
    for name, (_, shape) in shapes_of(directory).items():
        match = _LORA_NAME.fullmatch(name)
        assert match, name
        rows, columns = shape
        assert rows <= columns if match[3] == "A" else rows >= columns
