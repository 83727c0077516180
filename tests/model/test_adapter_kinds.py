"""A second kind of adapter is one file and one line in a table: nothing else knows what its tensors mean."""

from __future__ import annotations

import copy

import pytest
import torch
from toy_adapter import ScaledLinear

from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter
from llamatune.model.initialise import initialise
from llamatune.model.loss import summed_loss
from llamatune.model.transformer import Transformer
from llamatune.shapes.adapter import ADAPTER_KINDS, AdapterKind, AdapterSpec
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig, linear_path
from llamatune.shapes.recompute_levels import Recompute

CONFIG = LlamaConfig(48, 100, 3, 6, 2, 131)
TOY = AdapterSpec(1, 0.5, target_modules=LINEAR_MODULES, kind="toy")
IDS = torch.randint(3, 131, (1, 29), generator=torch.Generator().manual_seed(2))
LENGTHS = (11, 1, 17)


@pytest.fixture(autouse=True)
def toy_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTER_KINDS, "toy", AdapterKind("toy_adapter:ScaledLinear", {"toy_scale": ("out",)}))


def toy_model() -> Transformer:
    model = Transformer(CONFIG)
    initialise(model, 0, 0.15)
    apply_adapter(model, TOY)
    torch.manual_seed(1)
    for _, parameter in adapter_parameters(model):
        parameter.data.normal_(0, 0.3)
    return model.train()


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    summed_loss(model, IDS, IDS, LENGTHS).backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in adapter_parameters(model) if parameter.grad is not None}


@pytest.mark.parametrize("level", list(Recompute))
def test_fused_blocks_train_it_at_every_level(level: Recompute) -> None:
    model = toy_model()
    expected, fused = gradients(copy.deepcopy(model)), copy.deepcopy(model)
    apply_activation_checkpointing(fused, "none", fused=True, levels=(level,) * 3)
    found = gradients(fused)
    assert len(found) == 7 * 3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_its_shapes_and_count_follow_from_the_table() -> None:
    model = toy_model()
    shapes = {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model)}
    assert shapes == dict(TOY.checkpoint_shapes(CONFIG))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_parameters(CONFIG, TOY).trainable_parameters == trained == 3 * (48 * 3 + 16 * 2 + 100 * 2)


def test_merged_weights_compute_the_same() -> None:
    model, merged = toy_model().eval(), Transformer(CONFIG)
    initialise(merged, 0, 0.15)
    tensors = dict(adapter_parameters(model))
    with torch.no_grad():
        for layer, block in enumerate(merged.model.layers):
            for module in LINEAR_MODULES:
                weight = block.get_submodule(linear_path(module)).weight
                trained = tensors[f"model.layers.{layer}.{linear_path(module)}.toy_scale.weight"]
                weight[5:] = ScaledLinear.merged(weight[5:], (trained,), TOY.scaling(module), slice(5, None))
                weight[:5] = ScaledLinear.merged(weight[:5], (trained,), TOY.scaling(module), slice(0, 5))
        torch.testing.assert_close(merged(IDS), model(IDS), atol=1e-4, rtol=1e-4)


def test_one_module_may_have_another_rank_and_alpha() -> None:
    spec = AdapterSpec(4, 8, target_modules=("q_proj", "v_proj"), module_ranks=(("v_proj", 2),))
    model = Transformer(CONFIG)
    initialise(model, 0)
    apply_adapter(model, spec)
    shapes = {name: tuple(parameter.shape) for name, parameter in adapter_parameters(model)}
    assert shapes == dict(spec.checkpoint_shapes(CONFIG))
    assert shapes["model.layers.2.self_attn.v_proj.lora_A.weight"] == (2, 48)
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.scaling, attention.v_proj.scaling) == (2.0, 4.0)
