"""What a merge writes is spelled for every reader, and survives a format that has no word for it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from llamatune.checkpoints.loading import load_model
from llamatune.checkpoints.merging import merge_lora
from llamatune.checkpoints.model_directory import read_config
from llamatune.command_options.inference import MergeOptions

from .conftest import save_peft, save_tiny

TOKENS = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("spelling", ["4", "5", "alias", "theta apart", "nulls", "both"])
@pytest.mark.parametrize("dtype", ["same", "bfloat16"])
def test_merged_configurations_have_every_spelling(tiny, tiny_adapter, tmp_path, spelling, dtype):
    """transformers 5 reads rope_parameters and dtype; transformers 4, mlx-lm and Ollama rope_theta and torch_dtype."""
    base = tmp_path / "base"
    shutil.copytree(tiny[0], base)
    facts = json.loads((base / "config.json").read_text())
    for key in ("rope_parameters", "dtype", "tie_word_embeddings"):
        facts.pop(key)
    default = {"rope_type": "default", "rope_theta": 5e5}
    facts |= {
        "4": {"rope_theta": 500000, "rope_scaling": None, "torch_dtype": "float32"},
        "5": {"rope_parameters": default, "dtype": "float32"},
        "alias": {"rope_scaling": default, "torch_dtype": "float32"},
        "theta apart": {"rope_parameters": {"type": "default"}, "rope_theta": 5e5, "dtype": "float32"},
        "nulls": {"rope_parameters": {**default, "type": None}, "rope_theta": None, "torch_dtype": None,
                  "dtype": "float32"},
        "both": {"rope_parameters": default, "rope_theta": 5e5, "torch_dtype": "float32", "dtype": "float32",
                 "tie_word_embeddings": False},
    }[spelling]  # fmt: skip
    (base / "config.json").write_text(json.dumps(facts))
    merge_lora(MergeOptions(base, tiny_adapter, tmp_path / "out", dtype=dtype, force_base=True))
    if (spelling, dtype) == ("both", "same"):
        assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written["rope_parameters"]["rope_type"] == "default"
    assert written["dtype"] == written["torch_dtype"] == ("float32" if dtype == "same" else dtype)
    assert written["tie_word_embeddings"] is False
    assert read_config(tmp_path / "out").rope_theta == 5e5
    if dtype == "same":
        with torch.no_grad():
            theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits
            torch.testing.assert_close(load_model(tmp_path / "out")(TOKENS), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("theta", "positions"), [(1e6, 16384), (1e4, 2048), (1e4, 16384), (1e6, 4096)])
def test_the_context_length_survives_metas_format(tmp_path, theta, positions):
    """Which cannot tell it: Code Llama's is known by its theta, any other is in the manifest of the merge."""
    save_tiny(tmp_path / "base", rope_parameters={"rope_type": "default", "rope_theta": theta},
              max_position_embeddings=positions)  # fmt: skip
    for number, (source, target, format_) in enumerate((("base", "meta", "meta"), ("meta", "hf", "hf"))):
        adapter = save_peft(tmp_path / f"adapter{number}", tmp_path / "base", ["q_proj"], r=number + 1)
        merge_lora(MergeOptions(tmp_path / source, adapter, tmp_path / target, format_, force_base=True))
        config = read_config(tmp_path / target)
        assert (config.max_position_embeddings, config.rope_theta) == (positions, theta)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["max_position_embeddings"] == positions
    (tmp_path / "meta" / "llamatune.json").write_text("{")
    assert read_config(tmp_path / "meta").max_position_embeddings == (16384 if theta == 1e6 else 4096)
