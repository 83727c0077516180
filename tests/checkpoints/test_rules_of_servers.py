"""What is written keeps the rules of servers that are not run here: vLLM, TGI and Ollama."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from llamatune.checkpoints.adapter import Adapter
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions
from llamatune.shapes.adapter import AdapterSpec

from .conftest import save_adapter
from .rules_of_servers import (
    check_ollama_adapter,
    check_ollama_model,
    check_tgi_adapter,
    check_tgi_model,
    check_vllm_adapter,
)

LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "default, release 4": {"rope_theta": 5e5, "rope_scaling": None},
    "default, release 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "llama3, release 4": {"rope_theta": 500000, "rope_scaling": {"rope_type": "llama3", **LLAMA_3}},
    "llama3, release 5": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA_3}},
    "llama3, lengths as fractions": {
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", **LLAMA_3, "original_max_position_embeddings": 32.0},
    },
    "linear, old": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "linear, release 5": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
    "yarn, release 5": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0,
                                            "original_max_position_embeddings": 32}},
}  # fmt: skip
SCALINGS = {"llama3": {"rope_type": "llama3", **LLAMA_3}, "linear": {"type": "linear", "factor": 2.0}}


@pytest.mark.parametrize("rope", ROPES)
def test_a_merged_model_keeps_the_rules_of_servers(tiny, tiny_adapter, tiny_tokenizer, tmp_path, rope):
    base, kind = tmp_path / "base", rope.partition(",")[0]
    shutil.copytree(tiny[0], base)
    facts = json.loads((base / "config.json").read_text())
    del facts["rope_parameters"]
    (base / "config.json").write_text(json.dumps(facts | ROPES[rope]))
    shutil.copy(tiny_tokenizer, base / "tokenizer.model")
    merge_lora(MergeOptions(base, tiny_adapter, tmp_path / "out", force_base=True))
    check_tgi_model(tmp_path / "out", 5e5, kind)
    if kind != "yarn":  # which Ollama's converter does not know
        check_ollama_model(tmp_path / "out", 5e5, SCALINGS.get(kind))


def test_a_merge_from_metas_format_keeps_the_rules_of_servers(tiny_meta, tiny_adapter, tiny_tokenizer, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_meta, base)
    shutil.copy(tiny_tokenizer, base / "tokenizer.model")
    merge_lora(MergeOptions(base, tiny_adapter, tmp_path / "out", "hf", dtype="bfloat16", force_base=True))
    check_tgi_model(tmp_path / "out", 1e4)
    check_ollama_model(tmp_path / "out", 1e4)


@pytest.mark.parametrize("alpha", [8.0, 8, 16.0])
def test_an_adapter_keeps_the_rules_of_servers(tiny, tmp_path, alpha):
    config = open_checkpoint(tiny[0]).config
    spec = AdapterSpec(4, alpha, 0.0, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    tensors = {name: torch.ones(shape) for name, shape in spec.checkpoint_shapes(config)}
    save_adapter(tmp_path / "adapter", Adapter(spec, tensors, base_path=str(tiny[0])))
    check_vllm_adapter(tmp_path / "adapter")
    check_tgi_adapter(tmp_path / "adapter", config.num_hidden_layers)
    check_ollama_adapter(tmp_path / "adapter")
