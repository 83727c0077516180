"""Joined products: a model whose q, k, v and gate, up are one matrix each computes what it computes with them apart."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamatune.checkpoints.loading import load_model
from llamatune.command_options.inference import ModelSource
from llamatune.events import ignore_event, never_stop
from llamatune.inference.model_source import open_model
from llamatune.model.joined_products import joined_modules
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


def test_large_matrices_stay_apart() -> None:
    """Which are read from memory: their copy would take room and gain nothing."""
    assert joined_modules(PRESETS["llama-2-7b"]) == frozenset()
    assert joined_modules(LlamaConfig(512, 1376, 2, 8, 8, 1000)) == {"q_proj", "k_proj", "v_proj"}


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
