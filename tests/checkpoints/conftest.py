"""Tiny random models written by transformers, and Meta copies of them made by an independent road."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from llamatune.checkpoints.adapter import Adapter, write_adapter
from llamatune.formats.manifest import build_directory

REPOSITORY = Path(__file__).resolve().parents[2]


def save_tiny(path: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes):
    """A model of two blocks with grouped-query attention, all numbers different, as transformers writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **changes}, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(dtype).eval()
    model.save_pretrained(path, max_shard_size=shard)
    return model


def save_adapter(path: Path, adapter: Adapter, overwrite: bool = False) -> None:
    with build_directory(path, "adapter", {}, overwrite) as staging:
        write_adapter(staging, adapter)


def meta_rows(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Hugging Face's rows i and i + E/2 of a head are Meta's rows 2i and 2i + 1 (spelled out row by row)."""
    out = torch.empty_like(weight)
    for head in range(weight.shape[0] // head_dim):
        for i in range(head_dim // 2):
            out[head * head_dim + 2 * i] = weight[head * head_dim + i]
            out[head * head_dim + 2 * i + 1] = weight[head * head_dim + head_dim // 2 + i]
    return out


META_NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def meta_state(model) -> dict[str, torch.Tensor]:
    state = {}
    for name, weight in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            if rest.endswith(("q_proj", "k_proj")):
                weight = meta_rows(weight, model.config.head_dim)
            state[f"layers.{layer}.{META_NAMES[rest]}.weight"] = weight.clone()
        else:
            known = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
            state[f"{known[stem]}.weight"] = weight.clone()
    return state


def save_meta(path: Path, model, *, shards: int = 1, llama_3_split: bool = False, **params) -> Path:
    """A Meta directory of the same weights, split as Meta's model-parallel code splits them, with rope.freqs."""
    path.mkdir(parents=True)
    config = model.config
    for shard in range(shards):
        part = {}
        for name, weight in meta_state(model).items():
            by_columns = ("attention.wo", "feed_forward.w2") + (() if llama_3_split else ("tok_embeddings",))
            if "norm" in name:
                part[name] = weight
            else:
                axis = 1 if any(key in name for key in by_columns) else 0
                part[name] = weight.chunk(shards, axis)[shard].clone()
        part["rope.freqs"] = 1.0 / 10000 ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
        torch.save(part, path / f"consolidated.{shard:02d}.pth")
    facts = {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "multiple_of": 8, "norm_eps": 1e-5, "vocab_size": -1,
    }  # fmt: skip
    (path / "params.json").write_text(json.dumps({**facts, **params}))
    return path


def save_peft(path: Path, base: Path, targets: list[str], r: int = 4, alpha: float = 8, **options) -> Path:
    """An adapter that PEFT wrote, with a B that is not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """``(directory, transformers model)`` of the plain tiny model; read only."""
    path = tmp_path_factory.mktemp("tiny") / "hf"
    return path, save_tiny(path)


@pytest.fixture(scope="session")
def tiny_meta(tiny, tmp_path_factory):
    return save_meta(tmp_path_factory.mktemp("tiny") / "meta", tiny[1])


@pytest.fixture(scope="session")
def tiny_adapter(tiny, tmp_path_factory):
    return save_peft(tmp_path_factory.mktemp("tiny") / "adapter", tiny[0], ["q_proj", "v_proj"])


@pytest.fixture
def shared_fixtures() -> Path:
    path = Path(os.environ.get("LLAMATUNE_FIXTURES", REPOSITORY.parent / "shared" / "fixtures"))
    if not path.is_dir():
        pytest.skip(f"no fixtures at {path} (set LLAMATUNE_FIXTURES)")
    return path
