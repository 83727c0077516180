"""Starts of LoRA: what is drawn, and what is taken from the base, on quantised bases too; how it is stored."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from llamatune.errors import NumericsError, SpecError
from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters import from_base
from llamatune.model.adapters.apply import (
    adapter_parameters,
    apply_adapter,
    load_adapter_tensors,
    restored_tensors,
    stored_tensors,
)
from llamatune.model.float8 import Float8Weight
from llamatune.model.fused.window_casts import cast_for_window
from llamatune.model.initialise import initialise
from llamatune.model.loss import summed_loss
from llamatune.model.nf4 import NF4Weight
from llamatune.model.packed_weight import quantize_blocks
from llamatune.model.transformer import Transformer
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig
from llamatune.shapes.recompute_levels import Recompute

CONFIG = LlamaConfig(48, 100, 3, 6, 2, 131)
IDS = torch.randint(3, 131, (1, 29), generator=torch.Generator().manual_seed(2))
LENGTHS = (11, 1, 17)


def base(packed: Any = None, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(CONFIG)
    initialise(model, 0, 0.15)
    model.to(dtype)
    if packed is not None:
        quantize_blocks(model, packed, dtype)
    return model.train()


def spec_of(kind: str, **changes: Any) -> AdapterSpec:
    values = {"r": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": LINEAR_MODULES, "kind": kind}
    return AdapterSpec(**{**values, "module_ranks": (("q_proj", 3),), **changes})


def moved(model: Transformer) -> Transformer:
    """What is trained, away from where it began."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in adapter_parameters(model):
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: Transformer) -> dict[str, Tensor]:
    with cast_for_window(model, model.product_dtype):
        summed_loss(model, IDS, IDS, LENGTHS).backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in adapter_parameters(model) if parameter.grad is not None}


@pytest.mark.parametrize("packed", [None, NF4Weight, Float8Weight], ids=["fp32", "nf4", "float8"])
@pytest.mark.parametrize("kind", ["lora_fa", "pissa", "olora"])
def test_an_untrained_start_computes_the_logits_of_the_base(kind: str, packed: Any) -> None:
    model = base(packed)
    with torch.no_grad():
        before = model(IDS)
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        apply_adapter(model, spec_of(kind), 1)
        torch.testing.assert_close(model(IDS), before, atol=2e-4, rtol=0)
    after = model.state_dict()
    assert all(torch.equal(after[name].float(), one.float()) for name, one in weights.items())
    if kind != "lora_fa":
        assert all(parameter.any() for _, parameter in adapter_parameters(model))


@pytest.mark.parametrize("level", list(Recompute))
@pytest.mark.parametrize("kind", ["lora_fa", "pissa"])
def test_fused_equals_plain_at_every_level(kind: str, level: Recompute) -> None:
    model = base()
    apply_adapter(model, spec_of(kind), 1)
    fused = copy.deepcopy(moved(model))
    apply_activation_checkpointing(fused, "none", fused=True, levels=(level,) * 3)
    expected, found = gradients(model), gradients(fused)
    trained = [
        name for name, _ in adapter_parameters(model) if "lora_B" in name or ("lora_A" in name) > (kind == "lora_fa")
    ]
    assert list(expected) == list(found) == trained
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, atol=1e-4, rtol=1e-3)
    count = count_parameters(CONFIG, spec_of(kind))
    assert count.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count.total_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["lora", "lora_fa", "dora", "pissa", "olora"])
def test_what_is_stored_computes_the_same_and_gives_every_bit_back(kind: str, rslora: bool) -> None:
    spec, model = spec_of(kind, use_rslora=rslora, module_alphas=(("up_proj", 3.0),)), base()
    apply_adapter(model, spec, 1)
    tensors, written = dict(adapter_parameters(moved(model))), spec.stored()
    stored = stored_tensors(spec, tensors)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == dict(written.checkpoint_shapes(CONFIG))
    again = base()
    apply_adapter(again, written, seed=None)
    load_adapter_tensors(again, stored)
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), model(IDS), atol=2e-4, rtol=0)
    restored = restored_tensors(spec, stored)
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in tensors.items())


def test_gaussian_draws_a_as_peft_does() -> None:
    model = base()
    apply_adapter(model, spec_of("lora", r=40, module_ranks=(), drawn="gaussian"), 1)
    drawn = torch.cat([tensor.detach().flatten() for name, tensor in adapter_parameters(model) if "lora_A" in name])
    assert float(drawn.std()) == pytest.approx(1 / 40, rel=0.01)
    assert float((drawn.abs() < 1 / 40).float().mean()) == pytest.approx(0.683, abs=0.01)
    assert not any(tensor.any() for name, tensor in adapter_parameters(model) if "lora_B" in name)


def test_a_large_matrix_is_decomposed_by_iteration_as_by_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular values that fall as those of trained matrices do, by a power of their number."""
    generator = torch.Generator().manual_seed(4)
    U, V = (torch.linalg.qr(torch.randn(size, 60, generator=generator))[0] for size in (90, 60))
    W = U * (1 / torch.arange(1.0, 61.0)) @ V.T
    model = base()
    apply_adapter(model, spec_of("pissa", module_ranks=()))
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, from_base.PiSSALinear)
    exact = layer.parts_of(W, 4, generator)
    monkeypatch.setattr(from_base, "_MOST_EXACT", 8)
    found = layer.parts_of(W, 4, generator)
    torch.testing.assert_close(found[1] @ found[0], exact[1] @ exact[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.scaling * exact[1] @ exact[0], (U[:, :4] / torch.arange(1.0, 5.0)) @ V[:, :4].T)


def test_more_ranks_than_a_matrix_has_and_a_broken_base_are_refused() -> None:
    with pytest.raises(SpecError, match=r"lora\.r: .*rank 17 of a matrix of 16 x 48|rank 17 of a matrix of 16 x 48"):
        apply_adapter(base(), spec_of("olora", r=17, target_modules=("k_proj",), module_ranks=()))
    model = base()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(NumericsError, match="holds NaN"):
        apply_adapter(model, spec_of("pissa"))
