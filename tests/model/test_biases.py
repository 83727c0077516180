"""A linear layer with a frozen bias: by autograd, in the hand-written call, quantised, and under an adapter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llamatune.model.adapters.lora import LoRALinear
from llamatune.model.layers import Dropout, Linear
from llamatune.model.packed_weight import Scratch, hold_quantized
from llamatune.model.quantization import QUANTIZATIONS
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig, linear_module

KINDS = pytest.mark.parametrize("kind", [None, *QUANTIZATIONS])
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)], ids=str)


def layer_of(kind: str | None, dtype: torch.dtype) -> Linear:
    torch.manual_seed(2)
    layer = Linear(64, 30, bias=True)
    nn.init.normal_(layer.weight)
    nn.init.uniform_(layer.bias, 3, 5)
    layer.to(dtype).requires_grad_(False)
    if kind is not None:
        hold_quantized(layer, QUANTIZATIONS[kind].quantize(layer.weight.detach(), Scratch()))
    return layer


@torch.no_grad()
def assert_near(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert float((found.float() - expected).norm() / expected.norm()) < tolerance


def expected_of(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x.float(), layer.matrix(torch.float32).clone(), layer.bias.float())


@KINDS
@DTYPES
def test_by_autograd(kind: str | None, dtype: torch.dtype, tolerance: float) -> None:
    layer, x = layer_of(kind, dtype), torch.randn(2, 7, 64, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert (y.dtype, layer.bias.dtype) == (dtype, dtype)
    assert_near(y, expected_of(layer, x), tolerance)
    y.backward(grad := torch.randn_like(y))
    assert_near(x.grad, grad.float() @ layer.matrix(torch.float32), tolerance)


@KINDS
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32], ids=str)
def test_in_another_dtype_than_the_input(kind: str | None, held: torch.dtype) -> None:
    layer, x = layer_of(kind, held), torch.randn(7, 64, requires_grad=True)
    assert_near(layer(x), expected_of(layer, x), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_near(y, expected_of(layer, x), 0.01)


@KINDS
@DTYPES
def test_in_the_hand_written_call(kind: str | None, dtype: torch.dtype, tolerance: float) -> None:
    """Alone, into a tensor, and added to a residual stream, whose own place may be written to."""
    layer, x, residual = layer_of(kind, dtype), torch.randn(7, 64).to(dtype), torch.randn(7, 30).to(dtype)
    wanted = expected_of(layer, x)
    assert_near(layer(x, Dropout()), wanted, tolerance)
    out = torch.empty_like(residual)
    assert layer(x, Dropout(), out) is out
    assert_near(out, wanted, tolerance)
    assert_near(layer(x, Dropout(), None, residual), wanted + residual, tolerance)
    wanted = wanted + residual
    assert layer(x, Dropout(), residual, residual) is residual
    assert_near(residual, wanted, tolerance)


@KINDS
def test_an_adapter_keeps_it_and_does_not_train_it(kind: str | None) -> None:
    layer = layer_of(kind, torch.float32)
    adapted = LoRALinear(layer, {"lora_A": (4, 64), "lora_B": (30, 4)}, 2.0, 0.0)
    assert adapted.bias is layer.bias
    assert len(adapted.trained) == 2
    adapted.start(torch.Generator().manual_seed(1))
    x = torch.randn(7, 64)
    torch.testing.assert_close(adapted(x), layer(x))
    adapted.lora_B.data.normal_()
    update = x @ adapted.lora_A.T @ adapted.lora_B.T * 2
    for y in (adapted(x), adapted(x, Dropout())):
        torch.testing.assert_close(y, layer(x) + update, atol=1e-4, rtol=1e-4)


def test_it_is_trained_with_every_parameter() -> None:
    layer = layer_of(None, torch.float32).requires_grad_(True)
    layer(torch.randn(2, 7, 64)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((30,), 14.0))


def test_only_the_layers_that_a_configuration_names_have_one() -> None:
    config = LlamaConfig(48, 100, 1, 6, 2, 131, biased_modules=("k_proj", "down_proj"))
    assert [name for name in LINEAR_MODULES if Linear.of(config, name).bias is not None] == ["k_proj", "down_proj"]
    assert Linear.of(config, "k_proj").bias.shape == (16,)


@pytest.mark.parametrize(
    ("name", "module"),
    [("model.layers.3.mlp.up_proj.weight", "up_proj"), ("self_attn.q_proj.weight", "q_proj"),
     ("self_attn.q_proj.bias", None), ("self_attn.q_norm.weight", None), ("lm_head.weight", None), ("up_proj", None)],
)  # fmt: skip
def test_a_bias_is_no_matrix(name: str, module: str | None) -> None:
    assert linear_module(name) == module
