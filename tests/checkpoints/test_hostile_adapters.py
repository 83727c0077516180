"""Adapters that are broken or meant to harm: one line that names the fault, nothing executed, nothing that hangs."""

from __future__ import annotations

import json
import os
import pickle
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamatune.checkpoints import adapter_patterns
from llamatune.checkpoints.adapter import check_adapter, load_adapter
from llamatune.checkpoints.loading import open_checkpoint
from llamatune.errors import CheckpointError, LlamatuneError

from .conftest import save_peft, save_tiny

PREFIX = "base_model.model."
Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
EMBEDDING, HEAD = f"{PREFIX}model.embed_tokens", f"{PREFIX}lm_head"


def changed(adapter, tmp_path, tensors=lambda stored: stored, **config):
    """A copy with other tensors and other keys of the configuration."""
    path = tmp_path / "changed"
    path.mkdir()
    save_file(tensors(load_file(adapter / "adapter_model.safetensors")), path / "adapter_model.safetensors")
    facts = json.loads((adapter / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**facts, **config}))
    return path


def refused(path, base, *words):
    with pytest.raises(CheckpointError) as caught:
        check_adapter(load_adapter(path), open_checkpoint(base).config)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


class Harm:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_an_archive_does_not_run(tiny, tiny_adapter, tmp_path, legacy):
    path = changed(tiny_adapter, tmp_path)
    stored = load_file(path / "adapter_model.safetensors")
    (path / "adapter_model.safetensors").unlink()
    file, marker = path / "adapter_model.bin", str(tmp_path / "harmed")
    torch.save({**stored, "harm": Harm(marker)}, file, _use_new_zipfile_serialization=not legacy)
    refused(path, tiny[0], "adapter_model.bin", "code")
    file.write_bytes(pickle.dumps(Harm(marker)))
    refused(path, tiny[0], "adapter_model.bin", "code")
    assert not os.path.exists(marker)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_cut_files(tiny, tiny_adapter, tmp_path, name):
    path = changed(tiny_adapter, tmp_path)
    file = path / "adapter_model.safetensors"
    if name.endswith(".bin"):
        torch.save(load_file(file), path / name)
        file.unlink()
    data = (path / name).read_bytes()
    for size in (0, 7, 100, len(data) // 2, len(data) - 1):
        (path / name).write_bytes(data[:size])
        refused(path, tiny[0], name)


SHAPES = {
    "A of rank 0": ({f"{Q}.lora_A.weight": torch.ones(0, 32)}, {}, "lora_A.weight [0, 32] instead of [4, 32]"),
    "a vector": ({f"{Q}.lora_A.weight": torch.ones(128)}, {}, "lora_A.weight [128] instead of [4, 32]"),
    "three dimensions": ({f"{Q}.lora_B.weight": torch.ones(32, 4, 1)}, {}, "lora_B.weight [32, 4, 1]"),
    "integers": ({f"{Q}.lora_B.weight": torch.ones(32, 4, dtype=torch.int32)}, {}, "is I32"),
    "NaN": ({f"{Q}.lora_B.weight": torch.full((32, 4), torch.nan)}, {}, "NaN"),
    "an embedding's vector": (
        {f"{EMBEDDING}.lora_embedding_A": torch.ones(96), f"{EMBEDDING}.lora_embedding_B": torch.ones(32, 4)},
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        "model.embed_tokens.lora_B.weight [96] instead of [96, 4]",
    ),
    "tokens of other number": (
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.ones(3, 32)},
        {"trainable_token_indices": [1, 2]},
        "trainable_tokens_delta [3, 32] instead of [2, 32]",
    ),
    "a token beyond the vocabulary": (
        {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": torch.ones(2, 32)},
        {"trainable_token_indices": [1, 96]},
        "token 96 of a vocabulary of 96",
    ),
    "an embedding of another width": ({f"{EMBEDDING}.weight": torch.ones(96, 31)}, {}, "[96, 31] instead of [96, 32]"),
    "an embedding without dimensions": ({f"{EMBEDDING}.weight": torch.tensor(1.0)}, {}, "embed_tokens 0"),
    "a larger embedding alone": ({f"{EMBEDDING}.weight": torch.ones(97, 32)}, {}, "embed_tokens 97 and lm_head 96"),
    "a norm that is not named": ({f"{PREFIX}model.norm.weight": torch.ones(32)}, {}, "unexpected: model.norm.weight"),
    "another norm": (
        {f"{PREFIX}model.norm.weight": torch.ones(31)},
        {"modules_to_save": ["model.norm"]},
        "model.norm.weight [31] instead of [32]",
    ),
    "a bias that is not stated": ({f"{Q}.bias": torch.ones(32)}, {}, "unexpected: model.layers.0.self_attn.q_proj.b"),
    "a bias that the base has not": ({f"{Q}.bias": torch.ones(32)}, {"bias": "all"}, "q_proj.bias"),
    "a head of classes": ({f"{PREFIX}score.weight": torch.ones(2, 32)}, {"modules_to_save": ["score"]}, "score.weight"),
    "two of one name": ({f"{Q}.lora_A.default.weight": torch.ones(4, 32)}, {}, "two tensors are called"),
    "an adapter with another name": ({f"{Q}.lora_A.poet.weight": torch.ones(4, 32)}, {}, "unexpected"),
    "no layer": ({f"{PREFIX}model.layers.99999999.mlp.up_proj.lora_A.weight": torch.ones(4, 32)}, {}, "unexpected"),
    "a bias of the head": (
        {f"{HEAD}.lora_A.weight": torch.ones(4, 32), f"{HEAD}.lora_B.weight": torch.ones(96, 4)}
        | {f"{HEAD}.lora_B.bias": torch.ones(96)},
        {"target_modules": ["q_proj", "v_proj", "lm_head"], "lora_bias": True},
        "lm_head.lora_B.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", SHAPES)
def test_tensors_that_do_not_fit(tiny, tiny_adapter, tmp_path, row):
    tensors, config, word = SHAPES[row]
    stored = load_file(tiny_adapter / "adapter_model.safetensors")
    biases = {}
    if config.get("lora_bias"):
        of_B = [name for name in stored if "lora_B" in name]
        biases = {name.replace("lora_B.weight", "lora_B.bias"): torch.ones(len(stored[name])) for name in of_B}
    refused(changed(tiny_adapter, tmp_path, lambda stored: {**stored, **biases, **tensors}, **config), tiny[0], word)


def test_dora_of_the_embedding_is_another_kind(tiny, tmp_path):
    save_tiny(tmp_path / "base", hidden_size=32, vocab_size=96)
    adapter = save_peft(tmp_path / "a", tmp_path / "base", ["q_proj", "embed_tokens"], use_dora=True)
    refused(adapter, tmp_path / "base", "use_dora", "embedding")


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save"])
def test_a_pattern_that_takes_for_ever_is_stopped(tiny, tiny_adapter, tmp_path, monkeypatch, key):
    monkeypatch.setattr(adapter_patterns, "_SECONDS", 0.2)
    pattern = r"(?:[a-z0-9._]*)*!"
    value = {"rank_pattern": {pattern: 4}, "modules_to_save": [pattern]}.get(key, pattern)
    started = time.monotonic()
    refused(changed(tiny_adapter, tmp_path, **{key: value}), tiny[0], key, "list the modules")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "pattern", ["(" * 3000, "a" * 5000, "(?P<x>a)(?P<x>b)", "x{99999999999}", "\\", "(?:" * 1200 + ")" * 1200, "*"]
)
def test_what_is_no_pattern_is_refused(tiny, tiny_adapter, tmp_path, pattern):
    refused(changed(tiny_adapter, tmp_path, target_modules=pattern), tiny[0], "target_modules")


def test_too_many_patterns(tiny, tiny_adapter, tmp_path):
    patterns = {f"module_{n}": 4 for n in range(5000)}
    refused(changed(tiny_adapter, tmp_path, rank_pattern=patterns), tiny[0], "rank_pattern", "4,096")


MLX = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
NOT_MLX = [
    ({"fine_tune_type": "full"}, "fine_tune_type"),
    ({"fine_tune_type": "prompt"}, "fine_tune_type"),
    ({"lora_parameters": [4]}, "lora_parameters"),
    ({"lora_parameters": {"scale": 2.0}}, "rank"),
    ({"lora_parameters": {"rank": 0, "scale": 2.0}}, "rank"),
    ({"lora_parameters": {"rank": 4}}, "scale"),
    ({"lora_parameters": {"rank": 4, "scale": "2"}}, "scale"),
    ({"lora_parameters": {"rank": 4, "scale": 2.0, "keys": "q"}}, "keys"),
    ({"lora_parameters": {"rank": 5, "scale": 2.0}}, "[4, 32] instead of [5, 32]"),
    ({"lora_parameters": {"rank": 4, "scale": 2.0, "keys": ["self_attn.k_proj"]}}, "missing: model.layers.0.self_att"),
    ({"num_layers": "all"}, "num_layers"),
    ({"num_layers": None}, "num_layers"),
    ({"num_layers": 1}, "unexpected: model.layers.0.self_attn.q_proj"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "word"), NOT_MLX)
def test_mlx_configurations_that_do_not_fit(tiny, tmp_path, change, word):
    tensors = {}
    for layer in (0, 1):
        stem = f"model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{stem}.lora_a": torch.ones(32, 4), f"{stem}.lora_b": torch.ones(4, 32)}
    save_file(tensors, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**MLX, **change}))
    refused(tmp_path, tiny[0], word)


def test_an_older_scaling_of_mlx_is_not_guessed(tiny, tmp_path):
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(32, 4)}, tmp_path / "adapters.safetensors")
    parameters = {"rank": 4, "alpha": 16, "scale": 10.0, "dropout": 0.0}
    facts = {"lora_layers": 4, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts))
    refused(tmp_path, tiny[0], "lora_parameters", "num_layers")


def test_odd_directories(tiny, tiny_adapter, tmp_path):
    for name, words in {"absent": "no such adapter", "empty": "no adapter_config.json"}.items():
        if name == "empty":
            (tmp_path / name).mkdir()
        refused(tmp_path / name, tiny[0], words)
    path = changed(tiny_adapter, tmp_path)
    refused(path / "adapter_model.safetensors", tiny[0], "give the directory that holds it")
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "adapter.gguf", tiny[0], "adapters in GGUF are not read")
    (path / "adapter_model.safetensors").unlink()
    refused(path, tiny[0], "no such file")
    (path / "adapter_model.bin").symlink_to("/dev/zero")
    with pytest.raises(LlamatuneError, match="regular"):
        load_adapter(path)
