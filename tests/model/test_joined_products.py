"""Joined products: a model whose q, k, v and gate, up are one matrix each computes what it computes with them apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamatune.checkpoints.converting import convert
from llamatune.checkpoints.loading import load_model
from llamatune.command_options.conversion import ConvertOptions
from llamatune.command_options.inference import ModelSource
from llamatune.events import ignore_event, never_stop
from llamatune.inference.model_source import open_model
from llamatune.model.joined_products import copied_modules
from llamatune.model.transformer import Transformer
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shapes.presets import PRESETS

IDS = torch.tensor([[1, 7, 9, 4, 12, 5, 30], [1, 30, 31, 8, 2, 2, 19]])


@torch.inference_mode()
def logits(model: Transformer) -> torch.Tensor:
    found: torch.Tensor = model(IDS)
    return found


def are_joined(model: Transformer) -> bool:
    """Whether each layer's weight is a part of the joined one, in no other memory."""
    for block in model.model.layers:
        for module, names in ((block.self_attn, "qkv"), (block.mlp, ("gate", "up"))):
            if not hasattr(module, "joined"):
                return False
            where = module.joined.weight.data_ptr()
            for name in names:
                weight = module.get_submodule(f"{name}_proj").weight
                assert weight.data_ptr() == where
                where += weight.numel() * weight.element_size()
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [{}, {"model_type": "qwen2"}, {"model_type": "qwen3"}], ids=repr)
def test_logits_are_those_of_separate_products(
    tiny_base: Callable[..., Path], family: dict[str, Any], dtype: torch.dtype
) -> None:
    """With grouped heads, with biases of q, k and v, and with norms of heads."""
    base = tiny_base(dtype, **family)
    apart, joined = (load_model(base, joined=joined).eval() for joined in (False, True))
    assert are_joined(joined)
    assert not are_joined(apart)
    assert joined.state_dict().keys() == apart.state_dict().keys()
    for name, tensor in apart.state_dict().items():
        assert torch.equal(tensor, joined.state_dict()[name]), name
    expected, found = logits(apart).float(), logits(joined).float()
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"targets": ["k_proj", "up_proj"]}], ids=repr)
def test_adapters_act_on_joined_layers(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], kind: dict[str, Any]
) -> None:
    """The tuned model, and the base beside it, whose weights are the same memory."""
    base = tiny_base()
    adapter = peft_adapter(base, **kind)
    opened = open_model(ModelSource(base, adapter, compare=True, device="cpu"))
    models = opened.load(ignore_event, never_stop, generates=True).by_prefix
    assert are_joined(models["base_"])
    assert are_joined(models[""])
    for of_base, of_tuned in zip(models["base_"].model.layers, models[""].model.layers, strict=True):
        assert of_base.self_attn.joined is of_tuned.self_attn.joined
    torch.testing.assert_close(logits(models["base_"]), logits(load_model(base).eval()), atol=1e-5, rtol=0)
    assert not are_joined(opened.load(ignore_event, never_stop).by_prefix[""]), "a loss has the bits of training's"
    merged = open_model(ModelSource(base, adapter, device="cpu"), merge="on").load(
        ignore_event, never_stop, generates=True
    )
    assert not are_joined(merged.by_prefix[""])
    torch.testing.assert_close(logits(models[""]), logits(merged.by_prefix[""]), atol=1e-4, rtol=1e-4)
    assert (logits(models[""]) - logits(models["base_"])).abs().max() > 1e-3


LARGE = {"hidden_size": 516, "intermediate_size": 2112, "head_dim": 8}
"""So that gate and up are read from memory."""


def joins(model: Transformer) -> tuple[bool, bool]:
    """Whether the products of attention, and of the feed-forward, are joined in the first block."""
    block = model.model.layers[0]
    return hasattr(block.self_attn, "joined"), hasattr(block.mlp, "joined")


def in_two_files(base: Path, into: Path) -> Path:
    """The same model with the gates in a file of their own."""
    shutil.copytree(base, into)
    (file,) = into.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    gates = {name: name.endswith("gate_proj.weight") for name in tensors}
    files = {name: f"model-{1 + is_gate:05d}-of-00002.safetensors" for name, is_gate in gates.items()}
    for stored in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == stored}, into / stored, {"format": "pt"})
    (into / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return into


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_gate_and_up_are_joined_in_the_pages_of_the_file(
    tiny_base: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tiny_base(dtype, **LARGE)
    apart, joined = (load_model(base, joined=joined).eval() for joined in (False, True))
    assert joins(joined) == (True, True)
    for block in joined.model.layers:
        assert torch.equal(block.mlp.joined.weight, torch.cat((block.mlp.gate_proj.weight, block.mlp.up_proj.weight)))
        assert block.mlp.joined.weight.data_ptr() == block.mlp.gate_proj.weight.data_ptr()
    ids = torch.randint(3, 30, (1, 100), generator=torch.Generator().manual_seed(3))
    for tokens in (1, 5, 64, 100):
        with torch.inference_mode():
            expected, found = (model(ids[:, :tokens]).float() for model in (apart, joined))
        torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    for changed in ({"dtype": other}, {"writable": True}):
        assert joins(load_model(base, joined=True, **changed)) == (True, False), changed
    assert joins(load_model(in_two_files(base, tmp_path / "two"), joined=True)) == (True, False)


def test_large_q_k_and_v_are_joined_in_a_file_of_llamatune(tiny_base: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_base(torch.bfloat16, hidden_size=1026, intermediate_size=64, head_dim=256)
    written = tmp_path / "written"
    convert(ConvertOptions(base, written, dtype="same"))
    model, apart = load_model(written, joined=True).eval(), load_model(base).eval()
    assert joins(load_model(base, joined=True)) == (False, True), "o lies between k and q"
    assert joins(model) == (True, True)
    weight = model.model.layers[0].self_attn.joined.weight
    assert weight.data_ptr() == model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    ids = torch.randint(3, 30, (1, 100), generator=torch.Generator().manual_seed(3))
    for tokens in (1, 5, 100):
        with torch.inference_mode():
            torch.testing.assert_close(model(ids[:, :tokens]), apart(ids[:, :tokens]), atol=0.05, rtol=0)


def test_an_adapter_acts_on_large_joined_layers(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path]
) -> None:
    base = tiny_base(**LARGE)
    adapter = peft_adapter(base, targets=["gate_proj", "down_proj"])
    opened = open_model(ModelSource(base, adapter, device="cpu"))
    joined, apart = (opened.load(ignore_event, never_stop, generates=generates).by_prefix[""] for generates in (1, 0))
    assert (joins(joined), joins(apart)) == ((True, True), (False, False))
    torch.testing.assert_close(logits(joined), logits(apart), atol=1e-5, rtol=0)
    assert (logits(joined) - logits(load_model(base).eval())).abs().max() > 1e-3


def test_large_matrices_are_not_copied() -> None:
    """Which are read from memory: their copy would take room."""
    assert copied_modules(PRESETS["llama-2-7b"]) == frozenset()
    assert copied_modules(LlamaConfig(512, 1376, 2, 8, 8, 1000)) == {"q_proj", "k_proj", "v_proj"}


def test_layers_of_several_dtypes_stay_apart(tiny_base: Callable[..., Path], tmp_path: Path) -> None:
    base = tmp_path / "mixed"
    shutil.copytree(tiny_base(torch.float32), base)
    (file,) = base.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].bfloat16()
    save_file(tensors, file, {"format": "pt"})
    model = load_model(base, joined=True)
    assert not are_joined(model)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
