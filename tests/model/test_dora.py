"""DoRA against PEFT and against autograd: files, first values, logits, gradients with dropout, norms, merging."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_judges import IDS, adapted, reference_logits
from torch import Tensor

from llamatune.checkpoints.adapter import load_adapter, write_adapter
from llamatune.checkpoints.loading import load_model
from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions
from llamatune.formats.manifest import build_directory
from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter
from llamatune.model.adapters.dora import DoRALinear
from llamatune.model.float8 import Float8Weight
from llamatune.model.fused.window_casts import cast_for_window
from llamatune.model.initialise import initialise
from llamatune.model.layers import Dropout
from llamatune.model.loss import summed_loss
from llamatune.model.nf4 import NF4Weight
from llamatune.model.packed_weight import quantize_blocks
from llamatune.model.transformer import Transformer
from llamatune.shapes import tile_sizes
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig
from llamatune.shapes.recompute_levels import Recompute

CONFIG = LlamaConfig(48, 100, 3, 6, 2, 131)
DORA = AdapterSpec(4, 8, 0.0, LINEAR_MODULES, kind="dora")
LENGTHS = (11, 1, 17)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seams that divide neither the tokens nor the rows of a matrix."""
    monkeypatch.setattr(tile_sizes, "TILE_TOKENS", 7)
    monkeypatch.setitem(tile_sizes.NORMED_AT_ONCE, "cpu", 7 * 48)


def dora_model(dtype: torch.dtype = torch.float32, dropout: float = 0.0, packed: Any = None) -> Transformer:
    model = Transformer(CONFIG)
    initialise(model, 0, 0.15)
    model.to(dtype)
    if packed is not None:
        quantize_blocks(model, packed, dtype)
    apply_adapter(model, AdapterSpec(4, 8, dropout, LINEAR_MODULES, kind="dora"), 1)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapter_parameters(model):
        parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def gradients(model: Transformer, window: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(3, 131, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(5))
    if window:
        with cast_for_window(model, model.product_dtype):
            summed_loss(model, ids, ids, LENGTHS).backward()  # type: ignore[no-untyped-call]
    else:
        summed_loss(model, ids, ids, LENGTHS).backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in adapter_parameters(model) if parameter.grad is not None}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - one).norm() / one.norm()) for name, one in expected.items())


# Against PEFT


@pytest.mark.parametrize("targets", [list(LINEAR_MODULES), ["q_proj", "down_proj"]], ids=["seven", "two"])
def test_an_adapter_of_peft_gives_its_logits_merges_and_is_written_as_peft_does(
    tiny_base: Callable[..., Path], peft_adapter: Callable[..., Path], tmp_path: Path, targets: list[str]
) -> None:
    base = tiny_base()
    adapter = peft_adapter(base, targets, use_dora=True)
    reference = reference_logits(base, adapter=adapter)
    with torch.no_grad():
        torch.testing.assert_close(adapted(base, adapter)(IDS), reference, atol=1e-4, rtol=0)
    with build_directory(tmp_path / "ours", "adapter", {}) as staging:
        write_adapter(staging, load_adapter(adapter))
    torch.testing.assert_close(reference_logits(base, adapter=tmp_path / "ours"), reference, atol=0, rtol=0)
    merge_lora(MergeOptions(base, adapter, tmp_path / "merged"))
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "merged")(IDS), reference, atol=1e-4, rtol=0)
    assert (reference - reference_logits(base)).abs().max() > 0.1


def test_the_first_values_are_those_of_peft_and_change_no_logit(tiny_base: Callable[..., Path]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base = tiny_base()
    config = LoraConfig(r=4, target_modules=list(LINEAR_MODULES), use_dora=True)
    peft = get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), config).state_dict()
    model = load_model(base)
    with torch.no_grad():
        before = model(IDS)
        apply_adapter(model, DORA)
        torch.testing.assert_close(model.eval()(IDS), before, atol=0, rtol=0)
    magnitudes = {name: tensor for name, tensor in adapter_parameters(model) if "magnitude" in name}
    assert len(magnitudes) == 7 * 3
    for name, tensor in magnitudes.items():
        expected = peft[f"base_model.model.{name}.default.weight"]
        torch.testing.assert_close(tensor.detach(), expected, atol=0, rtol=1e-6)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert count_parameters(CONFIG, DORA).trainable_parameters == trained


@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_with_dropout_is_that_of_peft(biased: bool) -> None:
    """Of the same mask, which PEFT draws from the global generator: output and gradients in one training pass."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear as PeftLinear

    torch.manual_seed(0)
    ours = dora_model(dropout=0.4).model.layers[0].self_attn.k_proj
    assert isinstance(ours, DoRALinear)
    frozen = torch.nn.Linear(48, 16, bias=biased).requires_grad_(False)
    frozen.weight.data.copy_(ours.weight)
    ours.bias = frozen.bias
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.4, use_dora=True, target_modules=["k_proj"])
    peft = PeftLinear(frozen, "default", config, r=4, lora_alpha=8)
    theirs = (
        peft.lora_A["default"].weight, peft.lora_B["default"].weight, peft.lora_magnitude_vector["default"].weight,
    )  # fmt: skip
    for mine, one in zip(ours.trained, theirs, strict=True):
        one.data.copy_(mine)
    x = torch.randn(29, 48)
    results = []
    for layer, trained in ((ours, ours.trained), (peft.train(), theirs)):
        torch.manual_seed(7)
        given = x.clone().requires_grad_()
        y = layer(given)
        grads = torch.autograd.grad((y * torch.linspace(-1, 1, 16)).sum(), (given, *trained))
        results.append((y, *grads))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# The fused block


@pytest.mark.parametrize("level", list(Recompute))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_fused_equals_plain_at_every_level(level: Recompute, dtype: torch.dtype, tolerance: float) -> None:
    model = dora_model(dtype)
    fused = copy.deepcopy(model)
    apply_activation_checkpointing(fused, "none", fused=True, levels=(level,) * 3)
    expected, found = gradients(model), gradients(fused)
    assert len(expected) == 3 * 7 * 3
    assert worst(found, expected) < tolerance


@pytest.mark.parametrize("packed", [NF4Weight, Float8Weight])
def test_on_a_quantised_base(packed: Any) -> None:
    model = dora_model(packed=packed)
    fused = copy.deepcopy(model)
    apply_activation_checkpointing(fused, "none", fused=True)
    assert worst(gradients(fused, window=True), gradients(model)) < 2e-5


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("biased", [False, True])
def test_hand_written_gradients_are_those_of_autograd_on_the_same_mask(p: float, biased: bool) -> None:
    layer = dora_model(torch.float64).model.layers[0].mlp.down_proj
    assert isinstance(layer, DoRALinear)
    x, grad, dropout = torch.randn(9, 100).double(), torch.randn(9, 48).double(), Dropout(p, seed=4)
    A, B, m = layer.trained
    leaf, W = x.clone().requires_grad_(), layer.matrix(torch.float64).clone()
    d = leaf * (dropout.drop(torch.ones_like(x))[0])
    g = m / (W + layer.scaling * B @ A).norm(dim=1).detach()
    y = leaf @ W.T + (g - 1) * (d @ W.T) + g * layer.scaling * (d @ A.T @ B.T)
    if biased:  # which m does not scale
        layer.bias = torch.nn.Parameter(torch.randn(48).double(), requires_grad=False)
        y = y + layer.bias
        torch.testing.assert_close(layer.eval()(x) - layer.bias, leaf @ (g[:, None] * (W + layer.scaling * B @ A)).T)
    expected = torch.autograd.grad(y, (leaf, A, B, m), grad)
    with torch.no_grad():
        residual, before = torch.randn_like(y), torch.randn_like(x)
        torch.testing.assert_close(layer(x, dropout), y)
        into = residual.clone()
        layer(x, dropout, into, into)
        torch.testing.assert_close(into, y + residual)
        dx, trained = layer.gradients(grad, x, dropout, True, before.clone(), True)
        assert dx is not None
        torch.testing.assert_close((dx - before, *trained), expected)
        assert layer.gradients(grad, x, dropout, False)[0] is None


def test_every_level_gives_the_same_bits_with_dropout_on() -> None:
    runs = []
    for level in Recompute:
        model = dora_model(dropout=0.3)
        apply_activation_checkpointing(model, "none", fused=True, levels=(level,) * 3)
        torch.manual_seed(11)
        runs.append(gradients(model))
    assert all(torch.equal(run[name], one) for run in runs[1:] for name, one in runs[0].items())


def test_the_norms_are_taken_once_in_a_window_and_again_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dora_model()
    apply_activation_checkpointing(model, "none", fused=True, levels=(Recompute.BLOCK,) * 3)
    taken = []
    plain = DoRALinear._row_norms
    monkeypatch.setattr(DoRALinear, "_row_norms", lambda self, dtype: taken.append(self) or plain(self, dtype))
    gradients(model, window=True)
    assert len(taken) == len(set(map(id, taken))) == 7 * 3
    before = {name: tensor.clone() for name, tensor in gradients(model, window=True).items()}
    assert len(taken) == 2 * 7 * 3
    with torch.no_grad():
        for name, parameter in adapter_parameters(model):
            parameter.grad = None
            if "lora_B" in name:
                parameter.mul_(3)
    assert worst(gradients(model, window=True), before) > 0.01


def test_a_frozen_adapter_keeps_its_norms_until_others_are_loaded() -> None:
    from llamatune.model.adapters.apply import load_adapter_tensors

    model = dora_model().requires_grad_(False).eval()
    first = model(IDS)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, DoRALinear)
    assert layer._norms(torch.float32) is layer._norms(torch.float32)
    load_adapter_tensors(model, {name: 2 * tensor for name, tensor in adapter_parameters(model)})
    changed = model(IDS)
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        if isinstance(module, DoRALinear):
            module.forget()
    assert torch.equal(changed, fresh(IDS))
    assert not torch.allclose(first, changed)


def test_a_row_of_zeros_stays_zero_and_nothing_is_nan() -> None:
    model = dora_model()
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, DoRALinear)
    with torch.no_grad():
        layer.weight[5] = 0
        layer.lora_B[5] = 0
        layer.start(torch.Generator())
    x = torch.randn(3, 48)
    assert not layer(x)[:, 5].any()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    merged = layer.merged(layer.weight, layer.trained, layer.scaling)
    torch.testing.assert_close(x @ merged.T, layer(x))


def test_merging_some_rows_is_merging_all() -> None:
    layer = dora_model().model.layers[1].mlp.gate_proj
    assert isinstance(layer, DoRALinear)
    W, whole = layer.weight, layer.merged(layer.weight, layer.trained, layer.scaling)
    for first, last in itertools.pairwise((0, 3, 61, 100)):
        part = slice(first, last)
        torch.testing.assert_close(layer.merged(W[part], layer.trained, layer.scaling, part), whole[part])
    norms = whole.norm(dim=1)
    torch.testing.assert_close(norms, layer.lora_magnitude_vector.detach().abs(), atol=1e-5, rtol=1e-5)
