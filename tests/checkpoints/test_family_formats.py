"""The members of the family on disk: both formats, counts and merges."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamatune.checkpoints.loading import load_model, open_checkpoint
from llamatune.checkpoints.merging import merge_lora
from llamatune.checkpoints.model_directory import read_config
from llamatune.command_options.inference import MergeOptions
from llamatune.errors import CheckpointError
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.rope_scaling import Llama3Scaling

LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
TOKENS = torch.randint(0, 131, (1, 23), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def idle_adapter(peft_adapter, tmp_path):
    """An adapter that changes nothing: what is merged with it is the base."""

    def make(base, r):
        source = peft_adapter(base, ["q_proj"], r=r)
        path = tmp_path / f"idle-{r}"
        path.mkdir()
        (path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
        weights = load_file(source / "adapter_model.safetensors")
        save_file({name: x * ("lora_A" in name) for name, x in weights.items()}, path / "adapter_model.safetensors")
        return path

    return make


def merged(base, adapter, output, format_="same"):
    merge_lora(MergeOptions(base, adapter, output, format_, force_base=True))
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("tied", [False, True])
def test_llama_3_survives_both_formats(tiny_base, idle_adapter, tmp_path, dtype, factor, tied):
    base = tiny_base(
        dtype=dtype, rope_parameters={**LLAMA_3, "factor": factor}, tie_word_embeddings=tied,
        max_position_embeddings=131072,
    )  # fmt: skip
    meta = merged(base, idle_adapter(base, 1), tmp_path / "meta", "meta")
    facts = json.loads((meta / "params.json").read_text())
    assert (facts["use_scaled_rope"], facts["rope_theta"]) == (True, 5e5)
    assert facts.get("rope_scaling_factor") == (None if factor == 8 else factor), "as Meta's own, where it can be"
    with torch.no_grad():
        torch.testing.assert_close(load_model(meta)(TOKENS), load_model(base)(TOKENS), atol=1e-6, rtol=0)
    back = merged(meta, idle_adapter(base, 2), tmp_path / "hf", "hf")
    before, after = (load_file(path / "model.safetensors") for path in (base, back))
    assert before.keys() - {"lm_head.weight"} == after.keys() - {"lm_head.weight"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    config, expected = read_config(back), read_config(base)
    assert (config.rope_scaling, config.rope_theta) == (expected.rope_scaling, expected.rope_theta)
    assert config.max_position_embeddings == 131072
    theirs = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(back, torch.float32)(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "the rope type 'linear'"),
        ({"rope_parameters": {**LLAMA_3, "original_max_position_embeddings": 64}}, "the rope type 'llama3'"),
        ({"model_type": "mistral", "sliding_window": 9}, "sliding_window 9"),
    ],
)
def test_what_metas_format_cannot_say_is_refused(tiny_base, idle_adapter, tmp_path, changes, words):
    base = tiny_base(**changes)
    with pytest.raises(CheckpointError, match=words + ".*use --format hf"):
        merged(base, idle_adapter(base, 1), tmp_path / "meta", "meta")
    assert not (tmp_path / "meta").exists()


@pytest.mark.parametrize(
    ("params", "expected", "positions"),
    [
        ({"use_scaled_rope": True}, Llama3Scaling(8.0, 1.0, 4.0, 8192), 131072),
        ({"use_scaled_rope": True, "dim": 2048, "n_layers": 16}, Llama3Scaling(32.0, 1.0, 4.0, 8192), 131072),
        ({"use_scaled_rope": True, "dim": 3072, "n_layers": 28, "n_heads": 24},
         Llama3Scaling(32.0, 1.0, 4.0, 8192), 131072),
        ({"use_scaled_rope": True, "rope_scaling_factor": 16, "rope_high_freq_factor": 3},
         Llama3Scaling(16.0, 1.0, 3.0, 8192), 131072),
        ({"use_scaled_rope": False}, None, 8192),
        ({}, None, 8192),
    ],
)  # fmt: skip
def test_metas_params_say_little_of_llama_3(tmp_path, params, expected, positions):
    facts = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "rope_theta": 5e5}
    (tmp_path / "params.json").write_text(json.dumps(facts | params))
    config = read_config(tmp_path)
    assert (config.rope_scaling, config.max_position_embeddings) == (expected, positions)
    ends = (128001, 128009) if expected is None else (128001, 128008, 128009)
    assert (config.bos_token_id, config.eos_token_ids) == (128000, ends)


def test_mistrals_own_params(tmp_path):
    facts = {
        "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
        "norm_eps": 1e-5, "sliding_window": 4096, "vocab_size": 32000,
    }  # fmt: skip
    (tmp_path / "params.json").write_text(json.dumps(facts))
    config = read_config(tmp_path)
    assert (config.intermediate_size, config.head_dim, config.sliding_window) == (14336, 128, 4096)
    assert (config.model_type, config.max_position_embeddings) == ("mistral", 32768)
    (tmp_path / "params.json").write_text(json.dumps({**facts, "moe": {"num_experts": 8}}))
    with pytest.raises(CheckpointError, match=re.escape('moe is {"num_experts": 8}')):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2"}, "this qwen2 model has a bias in q_proj, k_proj, v_proj"),
        ({"model_type": "qwen3", "head_dim": 8}, "this qwen3 model has norms of the heads of q and k"),
        ({"model_type": "qwen3", "head_dim": 14}, "head_dim 14 x 6 heads is not hidden_size 48"),
        ({"model_type": "qwen3", "attention_bias": True, "head_dim": 8}, "o_proj and norms of the heads of q and k"),
        ({"attention_bias": True}, "a bias in q_proj, k_proj, v_proj, o_proj"),
        ({"mlp_bias": True, "tie_word_embeddings": True}, "a bias in gate_proj, up_proj, down_proj"),
    ],
)
def test_biases_and_norms_of_heads_are_counted_and_merged(tiny_base, peft_adapter, tmp_path, changes, words):
    from peft import PeftModel

    base = tiny_base(**changes)
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    counted = count_parameters(read_config(base))
    assert counted.base_parameters == sum(parameter.numel() for parameter in theirs.parameters())
    assert not any(name.endswith(("bias", "weight")) for name in counted.modules)
    adapter = peft_adapter(base)
    output = merged(base, adapter, tmp_path / "out")
    ours = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert type(ours) is type(theirs)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(theirs, adapter)(TOKENS).logits
        torch.testing.assert_close(ours(TOKENS).logits, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(load_model(output)(TOKENS), expected, atol=1e-4, rtol=0)
    assert open_checkpoint(output).config == read_config(base)
    with pytest.raises(CheckpointError, match=words + ".*use --format hf"):
        merged(base, adapter, tmp_path / "meta", "meta")
    assert not (tmp_path / "meta").exists()


@pytest.mark.parametrize("window", [6, None])
def test_mistral_is_merged_as_mistral(tiny_base, peft_adapter, tmp_path, window):
    from peft import PeftModel

    base = tiny_base(model_type="mistral", sliding_window=window)
    adapter = peft_adapter(base)
    output = merged(base, adapter, tmp_path / "out")
    facts = json.loads((output / "config.json").read_text())
    assert (facts["model_type"], facts["sliding_window"]) == ("mistral", window)
    judge = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        expected = judge(TOKENS).logits
        torch.testing.assert_close(load_model(output)(TOKENS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("generation", [None, {}, {"temperature": 0.5, "do_sample": True}, {"eos_token_id": [2, 5]}])
def test_every_end_of_text_is_written(tiny_base, idle_adapter, tmp_path, generation):
    base = tiny_base(eos_token_id=[2, 7])
    copy = tmp_path / "base"
    copy.mkdir()
    for file in ("config.json", "model.safetensors"):
        (copy / file).write_bytes((base / file).read_bytes())
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    output = merged(copy, idle_adapter(base, 1), tmp_path / "out")
    written = json.loads((output / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [2, 7], **(generation or {})}


def test_a_model_without_bos_is_given_none(tiny_base, idle_adapter, tmp_path):
    base = tiny_base(model_type="qwen2", bos_token_id=None)
    (base / "generation_config.json").unlink(missing_ok=True)
    output = merged(base, idle_adapter(base, 1), tmp_path / "out")
    assert json.loads((output / "generation_config.json").read_text()) == {"eos_token_id": 2}
