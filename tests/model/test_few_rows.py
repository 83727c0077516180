"""Products of few rows in bf16 on a CPU: equal to ``F.linear``, used in generation only; layers in inference mode."""

from __future__ import annotations

import copy
from threading import Thread
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llamatune.model.layers import RMSNorm, linear, rms_norm, swiglu
from llamatune.model.products import few_rows_linear, suits_few_rows
from llamatune.model.transformer import FeedForward
from llamatune.shapes.llama_config import LlamaConfig


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (5, 1), (1, 7), (32, 1), (3,)])
@pytest.mark.parametrize("out_features", [40, 11_000, 16_500])
@pytest.mark.parametrize(("biased", "any_layout"), [(False, False), (True, False), (True, True)])
def test_few_rows_equal_the_product_in_float64(
    shape: tuple[int, ...], out_features: int, biased: bool, any_layout: bool, amx: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*shape, 96, generator=generator).bfloat16()
    W = torch.randn(out_features, 96, generator=generator).bfloat16()
    bias = torch.randn(out_features, generator=generator).bfloat16() if biased else None
    exact = F.linear(x.double(), W.double(), None if bias is None else bias.double())
    found = few_rows_linear(x, W, bias, any_layout)
    assert found.shape == exact.shape
    assert found.is_contiguous() or (any_layout and found.flatten(0, -2).mT.is_contiguous())
    torch.testing.assert_close(found.double(), exact, rtol=2**-7, atol=2**-4)


def test_only_generation_in_bf16_uses_it(amx: bool) -> None:
    x, W = torch.randn(1, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()
    assert not suits_few_rows(x, W)
    with torch.no_grad():  # activation checkpointing computes so
        assert not suits_few_rows(x, W)
    with torch.inference_mode():
        assert suits_few_rows(x, W)
        assert suits_few_rows(x.expand(8, 1024), W) == amx
        assert torch.equal(linear(x, W), few_rows_linear(x, W))
        assert not suits_few_rows(x.expand(65, 1024), W)
        assert suits_few_rows(x, W[:1023])
        assert suits_few_rows(x.expand(2, 1024), W[:1023]) == (not amx)
        assert suits_few_rows(x[:, :512].expand(2, 512), W.view(2048, 512)) == amx  # large and narrow
        assert not suits_few_rows(x.expand(3, 1024), W[:1023])
        assert suits_few_rows(x.expand(3, 1024), W[:1023], any_layout=True) == amx
        assert suits_few_rows(torch.randn(1024, 3).bfloat16().T, W[:1023]) == amx
        assert not suits_few_rows(torch.randn(1024, 65).bfloat16().T, W[:1023])
        assert not suits_few_rows(x.float(), W.float())
        assert not suits_few_rows(x.half(), W.half())
        with torch.autocast("cpu", torch.bfloat16):
            assert not suits_few_rows(x, W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 96), (3, 5, 96), (170, 96), (171, 96)])
def test_norms_of_few_numbers_in_generation_are_torchs_and_give_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = RMSNorm(96, 1e-5).requires_grad_(False)
    norm.weight.data = torch.rand(96).add_(0.5).to(dtype)
    x = torch.randn(shape, dtype=dtype) * 3
    used: list[Any] = []
    real = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *args: used.append(args) or real(*args))
    trained = norm(x)
    assert not used
    with torch.inference_mode():
        assert torch.equal(norm(x), trained)
        assert torch.equal(norm(x), rms_norm(x, norm.weight, 1e-5))
        assert bool(used) == (shape != (171, 96))
        norm.weight.data = norm.weight.data.double()  # of another dtype than x
        used.clear()
        norm(x)
        assert not used


@pytest.mark.parametrize("width", [2048, 160])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (64, 1), (1, 65)])
def test_gate_and_up_lie_in_columns_and_the_output_in_rows(shape: tuple[int, int], width: int, amx: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    config = LlamaConfig(hidden_size=512, intermediate_size=width, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=4, vocab_size=8)  # fmt: skip
    module = FeedForward(config).bfloat16()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    x = torch.randn(*shape, 512, generator=generator).bfloat16()
    with torch.no_grad():
        expected = FeedForward.forward(module, x)
    exact = copy.deepcopy(module).double()(x.double())
    with torch.inference_mode():
        gate, up = module.gate_and_up(x)
        for factor in (gate, up):
            assert factor.is_contiguous() == (not amx or shape in ((1, 1), (1, 65)))
            assert factor.flatten(0, -2).mT.is_contiguous() == (shape == (1, 1) or (amx and shape != (1, 65)))
        assert swiglu(gate, up).data_ptr() == gate.data_ptr()
        found = module(x)
    assert found.is_contiguous()
    assert (found.double() - exact).abs().max() <= 1.5 * (expected.double() - exact).abs().max()


def test_a_product_without_onednn_leaves_its_switch_as_it_was(amx: bool) -> None:
    width = 8 if amx else 1024
    x, W = torch.randn(1, width).bfloat16(), torch.randn(width, width).bfloat16()
    before = torch._C._get_mkldnn_enabled()
    try:
        for chosen in (False, True):
            torch._C._set_mkldnn_enabled(chosen)
            few_rows_linear(x, W)
            assert torch._C._get_mkldnn_enabled() == chosen
            with pytest.raises(RuntimeError):
                few_rows_linear(x, W[:, :7])
            assert torch._C._get_mkldnn_enabled() == chosen
    finally:
        torch._C._set_mkldnn_enabled(before)


def test_threads_leave_the_switch_of_onednn_as_it_was() -> None:
    x, W = torch.randn(1, 512).bfloat16(), torch.randn(512, 512).bfloat16()
    before = torch._C._get_mkldnn_enabled()
    workers = [Thread(target=lambda: [few_rows_linear(x, W) for _ in range(1000)]) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    try:
        assert torch._C._get_mkldnn_enabled() == before
    finally:
        torch._C._set_mkldnn_enabled(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_gives_the_bits_of_training(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    x, gate, up = (torch.randn(3, 65, generator=generator).to(dtype) for _ in range(3))
    weight = torch.rand(65, generator=generator).to(dtype)
    before = x.clone()
    expected = rms_norm(x, weight, 1e-5), swiglu(gate, up)
    with torch.inference_mode():
        assert torch.equal(rms_norm(x, weight, 1e-5), expected[0])
        assert torch.equal(swiglu(gate.clone(), up), expected[1])
    assert torch.equal(x, before)
