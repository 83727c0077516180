"""Recomputing activations changes memory and nothing else: bit-equal with dropout on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import adapter_tensors, files, losses, make_spec, metrics

from llamatune.checkpoints.loading import load_model
from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter
from llamatune.model.loss import summed_loss
from llamatune.model.transformer import Attention, FeedForward, Transformer
from llamatune.shapes.adapter import AdapterSpec
from llamatune.training.train import train

MODES = ["block", "every_2", "every_3", "attention", "feed_forward", "sublayer"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[1, 5, 30, 9, 77, 4, 12, 51], [1, 3, 3, 70, 11, 25, 90, 6]])

_outcomes: dict[tuple[str, str], tuple[Any, ...]] = {}


def _outcome(mode: str, kind: str, base: Path, data: Path, directory: Path) -> tuple[Any, ...]:
    """Losses, gradient norms and final weights of four steps; the run without recomputation is made once."""
    if (mode, kind) not in _outcomes:
        lora = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all-linear"} if kind == "lora" else None
        precision = "bf16" if kind == "full, bf16" else "fp32"
        run = directory / f"{mode}-{kind}"
        train(
            make_spec(
                base, data, run, lora=lora, training__activation_checkpointing=mode, training__precision=precision
            )
        )
        trained = files(run / "adapter") if lora else {"model": (run / "model" / "model.safetensors").read_bytes()}
        _outcomes[mode, kind] = losses(run), [line["grad_norm"] for line in metrics(run, "step")], trained
    return _outcomes[mode, kind]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [(mode, kind) for mode in MODES for kind in ("lora", "full", "full, bf16")] + [("projections", "lora")],
)
def test_every_mode_gives_the_same_bits(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, mode: str, kind: str
) -> None:
    found = _outcome(mode, kind, tiny_base(), prepared(), tmp_path)
    expected = _outcome("none", kind, tiny_base(), prepared(), tmp_path)
    assert len(found[0]) == 4
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    assert found[2] == expected[2]


@pytest.mark.parametrize(
    ("mode", "attentions", "feed_forwards"),
    [
        ("none", [1, 1, 1], [1, 1, 1]),
        ("block", [2, 2, 2], [2, 2, 2]),
        ("every_2", [1, 2, 1], [1, 2, 1]),
        ("every_3", [1, 1, 2], [1, 1, 2]),
        ("attention", [2, 2, 2], [1, 1, 1]),
        ("feed_forward", [1, 1, 1], [2, 2, 2]),
        ("sublayer", [2, 2, 2], [2, 2, 2]),
    ],
)
def test_a_mode_recomputes_what_it_says_and_every_adapter_tensor_gets_a_gradient(
    tiny_base: Callable[..., Path], mode: str, attentions: list[int], feed_forwards: list[int]
) -> None:
    model = load_model(tiny_base())
    apply_adapter(model, AdapterSpec(4, 8, 0.1, tuple(SEVEN)))
    for name, parameter in adapter_parameters(model):
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    apply_activation_checkpointing(model, mode, fused=False)
    calls = _count_calls(model)
    summed_loss(model.train(), IDS, IDS).backward()
    assert [calls[f"model.layers.{layer}.self_attn"] for layer in range(3)] == attentions
    assert [calls[f"model.layers.{layer}.mlp"] for layer in range(3)] == feed_forwards
    for name, parameter in adapter_parameters(model):
        assert parameter.grad is not None, name
        assert float(parameter.grad.norm()) > 0, name


def _count_calls(model: Transformer) -> dict[str, int]:
    calls: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] = calls.get(name, 0) + 1

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Attention | FeedForward):
            module.register_forward_pre_hook(count(name))
    return calls


def test_dropout_differs_between_steps_and_between_seeds(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """Bit-equality above would be empty if dropout did nothing."""
    runs = {}
    for name, dropout, seed in (("off", 0.0, 0), ("on", 0.4, 0), ("again", 0.4, 0), ("other", 0.4, 1)):
        lora = {"r": 4, "alpha": 8, "dropout": dropout}
        train(make_spec(tiny_base(), prepared(), tmp_path / name, lora=lora, training__seed=seed, data__shuffle=False))
        runs[name] = adapter_tensors(tmp_path / name / "adapter")
    same = [name for name in runs["on"] if torch.equal(runs["on"][name], runs["again"][name])]
    assert len(same) == len(runs["on"])
    assert not any(torch.equal(runs["on"][name], runs["off"][name]) for name in runs["on"] if "lora_B" in name)
    assert not any(torch.equal(runs["on"][name], runs["other"][name]) for name in runs["on"])
