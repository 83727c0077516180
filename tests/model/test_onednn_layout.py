"""Int8 matrices by digits of x, in rows and in oneDNN's layout, against products of the same numbers in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llamatune.benchmarking.bandwidth import weight_bytes
from llamatune.benchmarking.category_meter import StorageMeter
from llamatune.command_options.inference import ModelSource, Sampling
from llamatune.events import ignore_event, never_stop
from llamatune.inference.engine import completions
from llamatune.inference.model_source import open_model
from llamatune.memory import int8_products
from llamatune.memory.generation import HeldModel, Work, plan_generation
from llamatune.model import int8, onednn_layout
from llamatune.model.int8 import Int8Weight
from llamatune.model.int8_digits import columns_by_digits
from llamatune.model.joined_products import join_products
from llamatune.model.onednn_layout import OnednnMatrix, has_onednn_layout
from llamatune.model.packed_weight import Scratch, quantize_blocks
from llamatune.model.transformer import Block, Transformer
from llamatune.processor import gains_by_onednn_layout
from llamatune.shapes.llama_config import LlamaConfig

SHAPES = [(64, 64), (37, 53), (1, 1), (130, 67), (515, 1031)]


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of 1,024 elements and more are rearranged."""
    monkeypatch.setattr(onednn_layout, "gains_by_onednn_layout", lambda: True)
    if not has_onednn_layout.__wrapped__():
        pytest.skip("oneDNN has no exact products of int8 on this processor")
    for module in (int8, int8_products):
        monkeypatch.setattr(module, "LEAST_IN_ONEDNN_LAYOUT", 1 << 10)
    monkeypatch.setattr(int8, "has_onednn_layout", lambda: True)
    monkeypatch.setattr(int8_products, "gains_by_onednn_layout", lambda: True)


def drawn(shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def weight_of(shape: tuple[int, int], seed: int = 0) -> Int8Weight:
    return Int8Weight.quantize(drawn(shape, 0.02, seed) * torch.logspace(-2, 2, shape[0])[:, None], Scratch())


def odd_rows(rows: int, columns: int) -> Tensor:
    """With an outlier that is a power of two but for one bit, zeros, tiny and huge numbers."""
    x = drawn((rows, columns), 2.0, 1)
    x[0, -1] = 255.0 * 2
    for row, factor in ((1, 0.0), (2, 1e-30), (3, 1e30)):
        x[row : row + 1] *= factor
    return x.bfloat16()


def assert_close(found: Tensor, x: Tensor, weight: Tensor, rounded: int = 1) -> None:
    """Half a unit of each row's digits for each weight, and bf16's rounding."""
    exact = x.double() @ weight.T
    of_digits = x.double().abs().amax(1, keepdim=True) / (127 * 128) / 2 * weight.abs().sum(1)
    bound = exact.abs() * 2**-8 * rounded + of_digits * (1 + 2**-7) + 1e-33
    assert found.dtype == torch.bfloat16
    assert bool(((found.double() - exact).abs() <= bound).all())


def assert_no_further(found: Tensor, other: Tensor, exact: Tensor) -> None:
    """Whether logits in bf16 are about as near to those in fp32 as the same by other products."""
    error, its = (float((logits.float() - exact).norm()) for logits in (found, other))
    assert 0 < error < 1.3 * its


def test_a_processor_that_gains_by_it_has_exact_products_in_onednns_layout() -> None:
    """What torch's documentation does not say may change; then this fails, and matrices stay in rows."""
    assert has_onednn_layout() == gains_by_onednn_layout()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 64, 65, 128, 129, 513])
@pytest.mark.usefixtures("layout")
def test_products_are_those_of_the_held_numbers(shape: tuple[int, int], rows: int) -> None:
    weight = weight_of(shape)
    held, x = weight.codes.double() * weight.scales.double()[:, None], odd_rows(rows, shape[1])
    in_layout = OnednnMatrix(weight.codes, weight.scales)
    assert torch.equal(in_layout.codes(), weight.codes)
    with torch.inference_mode():
        found = in_layout.product(x)
        across = in_layout.product(x.T.contiguous().T)
    assert (found.shape, found.is_contiguous()) == ((rows, shape[0]), True)
    assert torch.equal(across, found)
    assert_close(found, x, held, 1 if rows <= 64 else 3)
    if rows > 1 and shape[1] > 1:
        assert_close(columns_by_digits(x, weight.codes, weight.scales).T, x, held)


@pytest.mark.usefixtures("layout")
def test_a_row_is_the_same_in_other_company() -> None:
    weight, x = weight_of((515, 1031)), odd_rows(64, 1031)
    in_layout = OnednnMatrix(weight.codes, weight.scales)
    whole, columns = in_layout.product(x), columns_by_digits(x, weight.codes, weight.scales)
    for row in range(8):
        assert torch.equal(in_layout.product(x[row : row + 1])[0], whole[row])
        assert torch.equal(columns_by_digits(x[row : row + 2], weight.codes, weight.scales)[:, 0], columns[:, row])
    assert torch.equal(in_layout.product(x[5:21]), whole[5:21])


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, torch.finfo(torch.bfloat16).max])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.usefixtures("layout")
def test_a_row_that_is_not_finite_or_at_the_end_of_bf16_gives_nothing_finite(value: float, rows: int) -> None:
    weight, x = weight_of((48, 64)), drawn((rows, 64), 1.0, 3).bfloat16()
    x[0, 5] = value
    by_layout = OnednnMatrix(weight.codes, weight.scales).product(x)
    for found in (by_layout, columns_by_digits(x, weight.codes, weight.scales).T if rows > 1 else by_layout):
        assert not bool(found[0].isfinite().any())
        assert bool(found[1:].isfinite().all())


@pytest.mark.usefixtures("layout")
def test_a_rearranged_matrix_is_the_same_matrix() -> None:
    """In no other memory, alone and joined, in other dtypes, and for no rows."""
    whole = weight_of((96, 64))
    expected = {dtype: whole.unpacked(dtype).clone() for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    halves = zip(torch.split(whole.codes, (64, 32)), torch.split(whole.scales, (64, 32)), strict=True)
    parts = [
        Int8Weight(tuple(codes.shape), {"codes": codes.clone(), "scales": scales.clone()}, whole.scratch)
        for codes, scales in halves
    ]
    joined = Int8Weight.joined(parts)
    assert joined is not None
    for weight in (whole, joined):
        weight.rearrange()
        weight.rearrange()  # changes nothing more
    for weight, rows in ((whole, slice(None)), (joined, slice(None)), (parts[0], slice(64)), (parts[1], slice(64, 96))):
        assert weight.codes.numel() == 0
        for dtype, matrix in expected.items():
            assert torch.equal(weight.unpacked(dtype), matrix[rows])
            x = drawn((2, 3, 64), 1.0, 5).to(dtype)
            product, back = weight.product(x), weight.product_back(x[..., :1].expand(2, 3, weight.shape[0]))
            tolerance = 0.05 if dtype == torch.bfloat16 else 2e-3
            exact = x.double() @ matrix[rows].double().T
            torch.testing.assert_close(product.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max())
            assert (product.dtype, back.shape) == (dtype, (2, 3, 64))
            assert weight.product(x[:, :0]).shape == (2, 0, weight.shape[0])
    x = drawn((2, 3, 64), 1.0, 5).bfloat16()
    assert torch.equal(whole.product(x), joined.product(x))
    added, room = torch.ones(6, 96).bfloat16(), torch.empty(6, 96).bfloat16()
    assert whole.product(x.view(6, 64), room, added) is room
    torch.testing.assert_close(room, (whole.product(x).view(6, 96).float() + 1).bfloat16())
    assert joined.multiplies_joined(x)
    assert not joined.multiplies_joined(x.float())


def _refuses(*arguments: object) -> Tensor:
    raise RuntimeError("could not create a primitive descriptor")


def _errs(x: Tensor, *arguments: object) -> Tensor:
    return torch.ones(len(x), 67)


@pytest.mark.parametrize("operator", [_refuses, _errs])
def test_a_onednn_that_refuses_or_errs_is_not_used(
    operator: Callable[..., Tensor], layout: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.onednn.qlinear_pointwise, "default", operator)
    assert not has_onednn_layout.__wrapped__()


@pytest.fixture
def loaded(tiny_base: Callable[..., Path]) -> Callable[..., Iterator[Transformer]]:
    """A model in int8 as it is loaded to generate, and with its products apart."""

    def load(adapter: Path | None = None, **config: Any) -> Iterator[Transformer]:
        opened = open_model(ModelSource(tiny_base(torch.bfloat16, **config), adapter, device="cpu", dtype="int8"))
        return (opened.load(ignore_event, never_stop, generates=joined).by_prefix[""] for joined in (True, False))

    return load


@pytest.mark.parametrize("family", [{}, {"model_type": "qwen2"}, {"model_type": "qwen3"}], ids=repr)
@pytest.mark.usefixtures("layout")
def test_a_model_generates_with_rearranged_matrices(
    loaded: Callable[..., Iterator[Transformer]], family: dict[str, Any]
) -> None:
    model, apart = loaded(**family)
    codes = sum(name.endswith(".codes") and tensor.numel() for name, tensor in model.named_buffers())
    held = {id(tensor): tensor.nbytes for name, tensor in model.named_buffers() if name.endswith(".laid_out")}
    assert sum(held.values()) > codes
    assert weight_bytes(model) == weight_bytes(apart)
    ids = torch.randint(3, 30, (2, 70), generator=torch.Generator().manual_seed(3))
    exact = copy.deepcopy(apart).float()
    for tokens in (1, 5, 70):
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert_no_further(*(each(ids[:, :tokens]) for each in (model, apart, exact)))


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}], ids=repr)
@pytest.mark.parametrize("family", [{}, {"model_type": "qwen2"}], ids=repr)
@pytest.mark.usefixtures("layout")
def test_adapters_act_on_rearranged_matrices(
    loaded: Callable[..., Iterator[Transformer]],
    tiny_base: Callable[..., Path],
    peft_adapter: Callable[..., Path],
    kind: dict[str, Any],
    family: dict[str, Any],
) -> None:
    model, apart = loaded(peft_adapter(tiny_base(torch.bfloat16, **family), **kind), **family)
    (plain, _) = loaded(**family)
    ids = torch.randint(3, 30, (1, 20), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        found, expected, without = (each(ids) for each in (model, apart, plain))
        assert_no_further(found, expected, copy.deepcopy(apart).float()(ids))
    assert (found - without).abs().max() > 0.5


@pytest.mark.parametrize("work", [Work(100, 3, 1, 1, draws=False), Work(9, 3, 4, 4, draws=False)], ids=repr)
@pytest.mark.usefixtures("layout")
def test_the_planned_peak_is_that_of_the_tensors(work: Work) -> None:
    config = LlamaConfig(128, 512, 2, 4, 4, 97)
    torch.manual_seed(1)
    model = Transformer(config).requires_grad_(False).eval().bfloat16()
    for parameter in model.parameters():
        parameter.normal_(0, 0.05)
    quantize_blocks(model, Int8Weight, torch.bfloat16)
    for block in model.model.layers:
        assert isinstance(block, Block)
        join_products(block, config)
    meter = StorageMeter()  # type: ignore[no-untyped-call]
    meter.hold([*model.parameters(), *model.buffers()])
    weights = meter.peak_bytes
    sampling = Sampling(work.new_tokens, temperature=0.0)
    with meter:
        list(completions(model, [[1] * work.prompt_tokens] * work.at_once, sampling, (), work.rows))
    planned = plan_generation(HeldModel(config, "int8", "bfloat16", "bfloat16"), work)
    passes = [planned.moments[name] for name in ("reading prompts", "decoding")]
    assert max(moment.peak for moment in passes) - weights == pytest.approx(meter.peak_bytes - weights, rel=0.1)
