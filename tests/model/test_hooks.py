"""Every path through a training model enters its modules by ``__call__``: hooks see blocks, linear layers and model."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import nn

from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters.apply import apply_adapter
from llamatune.model.initialise import initialise
from llamatune.model.loss import summed_loss
from llamatune.model.nf4 import NF4Weight
from llamatune.model.packed_weight import quantize_blocks
from llamatune.model.transformer import Transformer
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig
from llamatune.shapes.recompute_levels import Recompute

CONFIG = LlamaConfig(48, 100, 3, 6, 2, 131)
IDS = torch.randint(3, 131, (1, 29), generator=torch.Generator().manual_seed(2))
PLAIN = ["none", "block", "every_2", "attention", "feed_forward", "sublayer"]
CASES = [("none", True, level) for level in Recompute] + [(mode, False, None) for mode in PLAIN]
CASES += [(mode, True, None) for mode in ("attention", "sublayer")]


def training_model(mode: str, fused: bool, level: Recompute | None, nf4: bool = False) -> Transformer:
    model = Transformer(CONFIG)
    initialise(model, 0, 0.15)
    if nf4:
        quantize_blocks(model, NF4Weight, torch.float32)
    apply_adapter(model, AdapterSpec(4, 8, 0.1, ("q_proj", "down_proj")))
    apply_activation_checkpointing(model, mode, fused, None if level is None else (level,) * CONFIG.num_hidden_layers)
    return model.train()


def step(model: Transformer) -> None:
    summed_loss(model, IDS, IDS, (11, 1, 17)).backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("nf4", [False, True], ids=["", "nf4"])
@pytest.mark.parametrize(("mode", "fused", "level"), CASES)
def test_a_hook_on_every_module_fires(mode: str, fused: bool, level: Recompute | None, nf4: bool) -> None:
    model, fired = training_model(mode, fused, level, nf4), Counter[str]()
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: fired.update([f"before {name}"]))
        module.register_forward_hook(lambda *_, name=name: fired.update([f"after {name}"]))
    step(model)
    watched = ["", "lm_head", *(f"model.layers.{layer}" for layer in range(3))]
    watched += [name for name, _ in model.named_modules() if name.split(".")[-1] in LINEAR_MODULES]
    assert len(watched) == 2 + 3 + 3 * 7
    assert [name for name in watched if not (fired[f"before {name}"] and fired[f"after {name}"])] == []
    assert fired["before "] == 1
    assert all(fired[f"before model.layers.{layer}"] == 1 for layer in range(3))


@pytest.mark.parametrize(("mode", "fused", "level"), CASES)
def test_a_model_is_freed_without_the_garbage_collector(mode: str, fused: bool, level: Recompute | None) -> None:
    model = training_model(mode, fused, level)
    step(model)
    gc.collect()
    gc.disable()
    try:
        watched: list[weakref.ref[nn.Module]] = [weakref.ref(module) for module in model.modules()]
        del model
        assert [reference() for reference in watched if reference() is not None] == []
    finally:
        gc.enable()
