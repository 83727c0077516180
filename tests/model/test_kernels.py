"""Which kernel computes attention on which device, and that each computes the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from llamatune.memory.attention import AttentionBytes
from llamatune.memory.sizes import Rows, Sizes
from llamatune.model import attention
from llamatune.model.attention import Documents, attend
from llamatune.shapes.attention_kernels import Kernel, choose_kernel, head_room
from llamatune.shapes.capabilities import Capability
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.spec import build_spec

CPU, V100, T4, A100, RTX3090, L4, H100, B200, RTX5090 = (
    None, (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)
)  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "dtype", "head", "tokens", "samples", "mask", "expected"),
    [
        (CPU, "float32", 128, 100, 1, "causal", "sdpa"),
        (CPU, "float16", 100, 100, 3, "causal", "sdpa"),
        (CPU, "bfloat16", 128, 256, 1, "causal", "fp32"),
        (CPU, "bfloat16", 100, 257, 3, "causal", "sdpa"),
        (CPU, "bfloat16", 128, 100, 1, "given", "sdpa"),
        (CPU, "bfloat16", 128, 1, 1, "none", "sdpa"),
        *((gpu, "bfloat16", 128, 100, 1, "causal", "sdpa") for gpu in (A100, RTX3090, L4, H100, B200, RTX5090)),
        *((gpu, "float16", 128, 100, 3, "causal", "varlen") for gpu in (A100, RTX3090, L4, H100, B200, RTX5090)),
        *((gpu, "float16", 128, 100, samples, "causal", "efficient") for gpu in (V100, T4) for samples in (1, 3)),
        *((gpu, "float32", 128, 100, samples, "causal", "efficient") for gpu in (T4, A100, H100) for samples in (1, 3)),
        (H100, "bfloat16", 100, 100, 3, "causal", "sdpa"),  # OpenLLaMA-3B
        (H100, "bfloat16", 100, 100, 1, "causal", "sdpa"),
        (H100, "bfloat16", 256, 100, 3, "causal", "varlen"),
        (H100, "bfloat16", 264, 100, 3, "causal", "efficient"),
        (H100, "bfloat16", 512, 100, 1, "causal", "efficient"),
        (H100, "bfloat16", 208, 100, 3, "causal", "varlen"),
        *((gpu, "bfloat16", 208, 100, 3, "causal", "efficient") for gpu in (RTX3090, L4, RTX5090)),
        (L4, "bfloat16", 192, 100, 3, "causal", "varlen"),
        (L4, "bfloat16", 256, 100, 3, "causal", "varlen"),
        (H100, "bfloat16", 128, 100, 1, "given", "efficient"),
        (H100, "bfloat16", 128, 1, 1, "none", "sdpa"),
        (T4, "float16", 128, 1, 1, "none", "efficient"),
        (H100, "float32", 128, 1, 1, "none", "efficient"),
        (CPU, "float64", 8, 29, 3, "causal", "sdpa"),
        (H100, "float64", 8, 29, 3, "causal", "efficient"),
    ],
)
def test_the_table_of_kernels(
    capability: Capability | None, dtype: str, head: int, tokens: int, samples: int, mask: str, expected: str
) -> None:
    assert choose_kernel(capability, dtype, head, tokens, samples, mask).value == expected


@pytest.mark.parametrize(
    ("capability", "dtype", "head", "expected"),
    [(T4, "float16", 100, 104), (H100, "float32", 100, 100), (H100, "float32", 50, 52), (T4, "float16", 128, 128),
     (CPU, "float32", 50, 50)],
)  # fmt: skip
def test_heads_are_filled_up_to_what_a_gpu_loads_at_once(
    capability: Capability | None, dtype: str, head: int, expected: int
) -> None:
    assert head_room(choose_kernel(capability, dtype, head, 100), capability, dtype, head) == expected


def pretend(monkeypatch: pytest.MonkeyPatch, capability: Capability) -> list[tuple[Any, ...]]:
    """Take CPU tensors for a GPU's; what SDPA and ragged attention are asked is recorded, and computed on the CPU."""
    calls: list[tuple[Any, ...]] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(("sdpa", q.shape, k.shape, options.get("enable_gqa", False)))
        return sdpa(q, k, v, **options)

    def varlen(q: Tensor, k: Tensor, v: Tensor, begin: Tensor, _: Tensor, *longest: int) -> Tensor:
        assert q.shape == k.shape == v.shape
        assert all(x.is_contiguous() for x in (q, k, v))
        calls.append(("varlen", q.shape, k.shape, False))
        edges = begin.tolist()
        parts = [
            sdpa(*(x[start:end].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True)[0].transpose(0, 1)
            for start, end in itertools.pairwise(edges)
        ]
        return torch.cat(parts)

    monkeypatch.setattr(attention, "capability_of", lambda device: capability)
    monkeypatch.setattr(attention, "_varlen", lambda: (varlen, {}))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    return calls


@pytest.mark.parametrize("lengths", [(7,), (5, 1, 9), (6, 6)], ids=str)
@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("head", [8, 12, 25])
@pytest.mark.parametrize(
    ("capability", "dtype"), [(T4, torch.float16), (H100, torch.float32), (H100, torch.bfloat16)], ids=str
)
def test_every_kernel_computes_what_a_cpu_does_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch,
    capability: Capability,
    dtype: torch.dtype,
    head: int,
    kv_heads: int,
    lengths: tuple[int, ...],
) -> None:
    torch.manual_seed(1)
    shapes = [(1, heads, sum(lengths), head) for heads in (6, kv_heads, kv_heads)]
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    documents = Documents(lengths, torch.device("cpu"))

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = attend(*leaves, None, documents)
        out.float().square().sum().backward()
        return [out.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)]

    expected = run(torch.float32)
    calls = pretend(monkeypatch, capability)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    for found, wanted in zip(run(dtype), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)
    for _, q_shape, k_shape, grouped in calls:
        repeated = q_shape[-3:-2] == k_shape[-3:-2] or len(q_shape) == 3
        if grouped:
            assert dtype == torch.bfloat16, "only FlashAttention reads a key head for several query heads"
        else:
            assert repeated
            assert q_shape[-1] % (4 if dtype == torch.float32 else 8) == 0
    ragged = dtype == torch.bfloat16 and head == 8 and len(lengths) > 1
    assert {name for name, *_ in calls} == {"varlen" if ragged else "sdpa"}


@pytest.mark.parametrize("lengths", [(7,), (5, 1, 9), (6, 6)], ids=str)
@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("under_autocast", [False, True])
def test_short_samples_in_bf16_on_a_cpu_are_rounded_once(
    lengths: tuple[int, ...], kv_heads: int, under_autocast: bool
) -> None:
    torch.manual_seed(1)
    shapes = [(1, heads, sum(lengths), 8) for heads in (6, kv_heads, kv_heads)]
    inputs = [torch.randn(shape).bfloat16() for shape in shapes]
    upstream = torch.randn(1, 6, sum(lengths), 8).bfloat16()
    documents = Documents(lengths, torch.device("cpu"))

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=under_autocast and dtype == torch.bfloat16):
            out = attend(*leaves, None, documents)
        return [out, *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    (found, *gradients), (wanted, *wanted_gradients) = run(torch.bfloat16), run(torch.float32)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted.bfloat16())
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), wanted_gradient, atol=2e-2, rtol=2e-2)


def test_a_mask_does_not_bring_grouped_heads_to_the_matrix_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, heads, 5, 8) for heads in (6, 2, 2))
    mask = (torch.rand(2, 1, 5, 5) > 0.5) | torch.eye(5).bool()
    expected, last = attend(q, k, v, mask, None), attend(q[:, :, -1:], k, v, None, None)
    calls = pretend(monkeypatch, H100)
    torch.testing.assert_close(attend(q, k, v, mask, None), expected)
    torch.testing.assert_close(attend(q[:, :, -1:], k, v, None, None), last)
    # One query reads each key-value head once, for the query heads that share it.
    assert [(k_shape[1], grouped) for _, _, k_shape, grouped in calls] == [(6, False), (2, False)]


@pytest.mark.parametrize(
    ("precision", "gpu", "kernel_inputs"),
    [("fp16", T4, 3), ("fp16", A100, 1.5), ("fp16", True, 3), ("bf16", True, 1.5), ("fp32", A100, 3), ("fp32", T4, 3)],
)
def test_the_plan_follows_the_kernel(precision: str, gpu: Capability | bool, kernel_inputs: float) -> None:
    config = LlamaConfig(64, 160, 2, 4, 1, 96)  # one key head for four query heads
    values = {"model": {"path": "x", "dtype": "float32"}, "lora": {}, "data": {"train": "x"}}
    spec = build_spec({**values, "training": {"output_dir": "x", "precision": precision}}, "test")
    made = AttentionBytes(Sizes(spec, config, Rows((50,), 50), gpu), (50,))
    assert made.inputs == kernel_inputs * 50 * 64 * (4 if precision == "fp32" else 2)


def test_the_plan_of_heads_that_are_filled_up() -> None:
    config = LlamaConfig(48, 160, 2, 4, 4, 96)  # heads of 12
    values = {"model": {"path": "x", "dtype": "float16"}, "lora": {}, "data": {"train": "x"}}
    spec = build_spec({**values, "training": {"output_dir": "x", "precision": "fp16"}}, "test")
    for gpu in (T4, H100):
        made = AttentionBytes(Sizes(spec, config, Rows((50,), 50), gpu), (50,))
        assert made.inputs == 3 * 50 * 4 * 16 * 2
        assert made.flat == 50 * 48 * 2
    assert choose_kernel(H100, "float16", 12, 50, 2) is Kernel.SDPA
