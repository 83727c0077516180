"""Adapters: PEFT reads ours, we read PEFT's, and what does not fit exactly is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import stat

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llamatune.checkpoints.adapter import Adapter, check_adapter, load_adapter, write_adapter
from llamatune.checkpoints.fingerprint import fingerprint
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.errors import CheckpointError, EnvironmentFault
from llamatune.events import Notice
from llamatune.formats.manifest import Staging
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.llama_config import LINEAR_MODULES

from .conftest import save_adapter, save_peft

TOKENS = torch.randint(0, 96, (2, 7), generator=torch.Generator().manual_seed(5))


def drawn(path, targets=("q_proj", "v_proj"), r=4, alpha=8.0, **facts):
    checkpoint = open_checkpoint(path)
    config = AdapterSpec(r, alpha, 0.05, tuple(targets), facts.pop("use_rslora", False))
    generator = torch.Generator().manual_seed(9)
    shapes = config.checkpoint_shapes(checkpoint.config)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes}
    return Adapter(config, tensors, fingerprint(checkpoint), base_path=str(path), **facts)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), LINEAR_MODULES])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_computes_with_our_adapter_what_the_formula_says(tiny, tmp_path, targets, use_rslora):
    adapter = drawn(tiny[0], targets, use_rslora=use_rslora)
    save_adapter(tmp_path / "a", adapter)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny[0]), tmp_path / "a").eval()
    by_hand = LlamaForCausalLM.from_pretrained(tiny[0])
    scaling = 8.0 / (math.sqrt(4) if use_rslora else 4)
    with torch.no_grad():
        for name, W in by_hand.named_parameters():
            stem = name.removesuffix(".weight")
            if f"{stem}.lora_A.weight" in adapter.tensors:
                W += scaling * adapter.tensors[f"{stem}.lora_B.weight"] @ adapter.tensors[f"{stem}.lora_A.weight"]
        torch.testing.assert_close(loaded(TOKENS).logits, by_hand(TOKENS).logits, rtol=1e-4, atol=1e-5)


def test_round_trip_keeps_every_bit_and_fact(tiny, tmp_path):
    template = {"name": "alpaca", "prompt": "{instruction}"}
    adapter = drawn(tiny[0], template=template)
    save_adapter(tmp_path / "a", adapter)
    again = load_adapter(tmp_path / "a")
    assert again.config == adapter.config
    assert (again.base_fingerprint, again.template, again.base_path) == (
        adapter.base_fingerprint, template, str(tiny[0]),
    )  # fmt: skip
    assert again.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(again.tensors[name], adapter.tensors[name]) for name in again.tensors)
    assert stat.S_IMODE((tmp_path / "a" / "adapter_model.safetensors").stat().st_mode) & 0o044  # others may read it
    with pytest.raises(EnvironmentFault):
        save_adapter(tmp_path / "a", adapter)
    save_adapter(tmp_path / "a", adapter, overwrite=True)


def test_configuration_is_complete_and_sorted(tiny, tmp_path):
    save_adapter(tmp_path / "a", drawn(tiny[0], ("v_proj", "q_proj")))
    facts = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert facts["target_modules"] == ["q_proj", "v_proj"]
    needed = (
        "peft_type task_type base_model_name_or_path revision r lora_alpha lora_dropout target_modules bias "
        "fan_in_fan_out inference_mode init_lora_weights use_rslora use_dora modules_to_save rank_pattern "
        "alpha_pattern layers_to_transform layers_pattern peft_version"
    )
    assert set(needed.split()) <= facts.keys()
    assert (facts["revision"], facts["bias"], facts["task_type"]) == (None, "none", "CAUSAL_LM")


def test_peft_adapter_loads_with_a_warning_about_its_base(tiny, tiny_adapter):
    adapter = load_adapter(tiny_adapter)
    stored = load_file(tiny_adapter / "adapter_model.safetensors")
    assert all(torch.equal(stored[f"base_model.model.{name}"], t) for name, t in adapter.tensors.items())
    events = []
    base = open_checkpoint(tiny[0])
    check_adapter(adapter, base.config, fingerprint(base), False, events.append)
    assert [(type(e), e.kind) for e in events] == [(Notice, "warning")]
    assert "which base" in events[0].message


def test_adapter_in_bfloat16_is_widened(tiny, tiny_adapter, tmp_path):
    path = copy_of(tiny_adapter, tmp_path)
    stored = {n: t.bfloat16() for n, t in load_file(path / "adapter_model.safetensors").items()}
    save_file(stored, path / "adapter_model.safetensors", {"format": "pt"})
    assert {t.dtype for t in load_adapter(path).tensors.values()} == {torch.float32}


def test_another_base_is_refused_unless_forced_a1(tiny, tmp_path):
    adapter, config = drawn(tiny[0]), open_checkpoint(tiny[0]).config
    check_adapter(adapter, config, adapter.base_fingerprint)
    with pytest.raises(CheckpointError, match="another base") as caught:
        check_adapter(adapter, config, "sha256:0")
    assert caught.value.exit_code == 4
    assert "--force-base" in str(caught.value)
    events = []
    check_adapter(adapter, config, "sha256:0", True, events.append)
    assert "force-base" in events[0].message


def test_an_adapter_of_a_base_of_another_shape_says_so_and_names_no_tensor(tiny):
    adapter, config = drawn(tiny[0]), open_checkpoint(tiny[0]).config
    larger = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers + 3)
    for force_base in (False, True):
        with pytest.raises(CheckpointError, match="the adapter was trained on another base") as caught:
            check_adapter(adapter, larger, "sha256:0", force_base)
        message = str(caught.value)
        layers = f"num_hidden_layers {config.num_hidden_layers}, here {config.num_hidden_layers + 3}"
        assert message.endswith(f", of another shape ({layers}): adapter: give that base")
    with pytest.raises(CheckpointError, match=r"missing: .*lora_A"):  # damaged: it is of this base
        check_adapter(adapter, larger, adapter.base_fingerprint)


def copy_of(adapter, tmp_path):
    path = tmp_path / "copy"
    path.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (path / name).write_bytes((adapter / name).read_bytes())
    return path


def refused(path, tiny, *words):
    with pytest.raises(CheckpointError) as caught:
        check_adapter(load_adapter(path), open_checkpoint(tiny[0]).config)
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in message
    for word in words:
        assert word in message, message


CHANGES = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"peft_type": None}, "peft_type"),
    ({"r": None}, "r is"),
    ({"r": 0}, "r is"),
    ({"r": True}, "r is"),
    ({"r": 1 << 40}, "r is"),
    ({"lora_alpha": None}, "lora_alpha"),
    ({"lora_alpha": "8"}, "lora_alpha"),
    ({"lora_alpha": 10**400}, "lora_alpha"),
    ({"lora_dropout": 2}, "lora_dropout"),
    ({"use_dora": 1}, "use_dora"),
    ({"use_dora": True}, "missing: model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    ({"lora_bias": True}, "missing: model.layers.0.self_attn.q_proj.lora_B.bias"),
    ({"lora_bias": "yes"}, "lora_bias"),
    ({"bias": "some"}, "bias"),
    ({"modules_to_save": ["lm_head"]}, "missing: lm_head.weight"),
    ({"modules_to_save": ["mlp"]}, "missing: model.layers.0.mlp.gate_proj.weight"),
    ({"modules_to_save": ["q_proj"]}, "unexpected: model.layers.0.self_attn.q_proj.lora_A.weight"),
    ({"modules_to_save": "lm_head"}, "modules_to_save"),
    ({"rank_pattern": {"q_proj": 8}}, "q_proj.lora_A.weight [4, 32] instead of [8, 32]"),
    ({"rank_pattern": {"layers.1.self_attn.q_proj": 3}}, "layers.1.self_attn.q_proj.lora_A.weight [4, 32] instead of"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    ({"rank_pattern": {"(": 4}}, "rank_pattern"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
    ({"layers_to_transform": [0]}, "unexpected: model.layers.1.self_attn.q_proj.lora_A.weight"),
    ({"layers_to_transform": [-1]}, "layers_to_transform"),
    ({"layers_to_transform": [0, 1], "layers_pattern": "blocks"}, "unexpected: model.layers.0.self_attn.q_proj.lora_A"),
    ({"layers_to_transform": [0, 1], "target_modules": ".*[qv]_proj"}, "layers_to_transform"),
    ({"exclude_modules": ["v_proj"]}, "unexpected: model.layers.0.self_attn.v_proj.lora_A.weight"),
    ({"exclude_modules": 5}, "exclude_modules"),
    ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    ({"target_parameters": ["experts.w1"]}, "target_parameters"),
    ({"use_qalora": True}, "use_qalora"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"trainable_token_indices": [1]}, "missing: model.embed_tokens.token_adapter.trainable_tokens_delta"),
    ({"trainable_token_indices": [1, 1]}, "trainable_token_indices"),
    ({"trainable_token_indices": {"lm_head": [-1]}}, "trainable_token_indices"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    ({"init_lora_weights": "olora"}, "init_lora_weights"),
    ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    ({"init_lora_weights": "corda"}, "init_lora_weights"),
    ({"use_rslora": 1}, "use_rslora"),
    ({"some_future_feature": True}, "some_future_feature"),
    ({"target_modules": None}, "target_modules"),
    ({"target_modules": r".*\.(q|v|k)_proj"}, "missing: model.layers.0.self_attn.k_proj.lora_A.weight"),
    ({"target_modules": r".*\.q_proj"}, "unexpected: model.layers.0.self_attn.v_proj.lora_A.weight"),
    ({"target_modules": "["}, "target_modules"),
    ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "missing: lm_head.lora_A.weight"),
    ({"target_modules": []}, "target_modules"),
    ({"target_modules": [1]}, "target_modules"),
    ({"target_modules": ["q_proj"]}, "unexpected: model.layers.0.self_attn.v_proj.lora_A.weight"),
    ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "missing: model.layers.0.self_attn.k_proj.lora_A.weight"),
    ({"target_modules": "all-linear"}, "missing: model.layers.0.self_attn.k_proj.lora_A.weight"),
    ({"target_modules": ["q_proj"]}, "target_modules ['q_proj']"),
    ({"r": 8}, "wrong shape: model.layers.0.self_attn.q_proj.lora_A.weight [4, 32] instead of [8, 32]"),
]


@pytest.mark.parametrize(("change", "word"), CHANGES, ids=[f"{i}-{next(iter(c))}" for i, (c, _) in enumerate(CHANGES)])
def test_configurations_that_plain_lora_cannot_honour(tiny, tiny_adapter, tmp_path, change, word):
    path = copy_of(tiny_adapter, tmp_path)
    facts = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**facts, **change}))
    refused(path, tiny, word)


def test_keys_that_do_not_match_a2(tiny, tiny_adapter, tmp_path):
    path = copy_of(tiny_adapter, tmp_path)
    stored = load_file(path / "adapter_model.safetensors")
    first = sorted(stored)[0]
    renamed = {name.replace("base_model.model.", ""): tensor for name, tensor in stored.items()}
    save_file(renamed, path / "adapter_model.safetensors", {"format": "pt"})
    refused(path, tiny, "missing: ", "unexpected: ")
    save_file({k: v for k, v in stored.items() if k != first}, path / "adapter_model.safetensors")
    refused(path, tiny, "missing: " + first.removeprefix("base_model.model."))
    save_file(
        {**stored, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}, path / "adapter_model.safetensors"
    )
    refused(path, tiny, "unexpected: lm_head.lora_A.weight")
    save_file({}, path / "adapter_model.safetensors")
    refused(path, tiny, "and 3 more")


def test_zero_b_is_a_warning_a2(tiny):
    adapter = drawn(tiny[0])
    for name in adapter.tensors:
        if "lora_B" in name:
            adapter.tensors[name].zero_()
    events = []
    check_adapter(adapter, open_checkpoint(tiny[0]).config, adapter.base_fingerprint, on_event=events.append)
    assert ["lora_B is zero" in event.message for event in events] == [True]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_tensors_are_neither_read_nor_written(tiny, tiny_adapter, tmp_path, value):
    path = copy_of(tiny_adapter, tmp_path)
    stored = load_file(path / "adapter_model.safetensors")
    stored[sorted(stored)[1]][0, 0] = value
    save_file(stored, path / "adapter_model.safetensors", {"format": "pt"})
    refused(path, tiny, "NaN or infinity", "lora_B")
    adapter = drawn(tiny[0])
    next(iter(adapter.tensors.values()))[0, 0] = value
    with pytest.raises(CheckpointError):
        write_adapter(Staging(tmp_path), adapter)
    with pytest.raises(CheckpointError):
        save_adapter(tmp_path / "new", adapter)
    assert not (tmp_path / "new").exists()


def test_flipped_bit_is_noticed(tiny, tmp_path):
    save_adapter(tmp_path / "a", drawn(tiny[0]))
    file = tmp_path / "a" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused(tmp_path / "a", tiny, "differs from what its manifest recorded")


def test_directories_that_hold_no_adapter(tiny, tmp_path):
    for path, word in ((tmp_path / "absent", "no such adapter"), (tiny[0], "adapter_config.json")):
        with pytest.raises(CheckpointError, match=word):
            load_adapter(path)
    run = tmp_path / "run"
    run.mkdir()
    save_adapter(run / "adapter", drawn(tiny[0]))
    with pytest.raises(CheckpointError, match="did you mean"):
        load_adapter(run)


def test_rslora_from_peft(tiny, tmp_path):
    save_peft(tmp_path / "a", tiny[0], ["o_proj", "down_proj"], r=4, alpha=6, use_rslora=True)
    adapter = load_adapter(tmp_path / "a")
    assert adapter.config.scaling() == 3.0
    check_adapter(adapter, open_checkpoint(tiny[0]).config)


def test_fixture_adapter(shared_fixtures):
    adapter = load_adapter(shared_fixtures / "peft-adapter-qv")
    assert (adapter.config.r, adapter.config.alpha, adapter.config.target_modules) == (4, 8.0, ("q_proj", "v_proj"))
    for name in ("hf", "meta"):
        check_adapter(adapter, open_checkpoint(shared_fixtures / f"stories260K-{name}").config)
