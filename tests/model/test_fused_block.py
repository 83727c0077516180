"""The hand-written functions compute what the plain modules compute, and their gradients are right with dropout on."""

import contextlib
import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llamatune.model.activation_checkpointing import apply_activation_checkpointing
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter
from llamatune.model.fused import operations
from llamatune.model.initialise import initialise
from llamatune.model.layers import Dropout, RMSNorm
from llamatune.model.loss import summed_loss
from llamatune.model.nf4 import NF4Weight
from llamatune.model.packed_weight import quantize_blocks
from llamatune.model.rope import rotary_angles
from llamatune.model.transformer import Transformer
from llamatune.shapes import tile_sizes
from llamatune.shapes.adapter import AdapterSpec
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig
from llamatune.shapes.recompute_levels import Recompute

LENGTHS = (11, 1, 17)
LEVELS = list(Recompute)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that do not divide the rows, so that their seams are tested."""
    monkeypatch.setattr(tile_sizes, "TILE_TOKENS", 7)


ADDED: dict[str, Any] = {"biased_modules": LINEAR_MODULES, "head_norms": True, "head_dim": 10}


def model_with(targets: list[str], dtype: torch.dtype, r: int = 4, dropout: float = 0.0, **changes: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(LlamaConfig(48, 100, 3, 6, 2, 131, **changes))
    initialise(model, 0, 0.15)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
    model.to(dtype)
    if not targets:
        return model.train()
    apply_adapter(model, AdapterSpec(r, 8, dropout, tuple(targets)), 1)
    for name, parameter in adapter_parameters(model):
        if dtype == torch.float64:
            parameter.data = parameter.data.double()
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    return model.train()


def gradients(
    model: Transformer, autocast: torch.dtype | None = None, lengths: tuple[int, ...] = LENGTHS
) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(5)
    ids = torch.randint(3, 131, (1, sum(lengths)))
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
        loss = summed_loss(model, ids, labels, lengths)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in adapter_parameters(model) if p.grad is not None}


def fused_copy(model: Transformer, level: Recompute) -> Transformer:
    twin = copy.deepcopy(model)
    apply_activation_checkpointing(twin, "none", fused=True, levels=(level,) * len(twin.model.layers))
    return twin


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - one).norm() / one.norm()) for name, one in expected.items())


TARGETS = [["q_proj", "v_proj"], list(LINEAR_MODULES), ["down_proj"], ["o_proj"], ["gate_proj", "k_proj"], ["up_proj"]]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("targets", TARGETS, ids="+".join)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_fused_equals_plain(targets: list[str], dtype: torch.dtype, tolerance: float, level: Recompute) -> None:
    model = model_with(targets, dtype)
    loss, expected = gradients(copy.deepcopy(model))
    found_loss, found = gradients(fused_copy(model, level))
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert len(expected) == 2 * 3 * len(targets)
    assert worst(found, expected) < tolerance


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("targets", [TARGETS[0], TARGETS[1], TARGETS[3]], ids="+".join)
def test_with_biases_and_norms_of_heads_fused_equals_plain(targets: list[str], level: Recompute) -> None:
    model = model_with(targets, torch.float64, **ADDED)
    loss, expected = gradients(copy.deepcopy(model))
    found_loss, found = gradients(fused_copy(model, level))
    assert found_loss == pytest.approx(loss, rel=1e-12)
    assert worst(found, expected) < 1e-11
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data.fill_(1)
        layer.mlp.down_proj.bias.data.zero_()
    assert gradients(model)[0] != pytest.approx(loss, rel=1e-3), "it makes no difference"


@pytest.mark.parametrize("changes", [{}, ADDED], ids=["", "with biases and norms of heads"])
@pytest.mark.parametrize("level", LEVELS)
def test_on_an_nf4_base_fused_equals_plain(level: Recompute, changes: dict[str, Any]) -> None:
    model = model_with([], torch.float32, **changes)
    quantize_blocks(model, NF4Weight, torch.float32)
    apply_adapter(model, AdapterSpec(4, 8, 0.0, LINEAR_MODULES), 1)
    for name, parameter in adapter_parameters(model):
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    loss, expected = gradients(copy.deepcopy(model))
    found_loss, found = gradients(fused_copy(model, level))
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert worst(found, expected) < 1e-5


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("r", "changes"), [(1, {}), (16, {}), (4, ADDED)], ids=["1", "16", "with biases and norms of heads"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16 weights", "fp32 weights"])
def test_under_bf16_fused_is_as_near_to_the_truth_as_plain(
    dtype: torch.dtype, r: int, changes: dict[str, Any], level: Recompute
) -> None:
    model = model_with(list(LINEAR_MODULES), dtype, r, **changes)
    truth = copy.deepcopy(model).double()
    _, expected = gradients(truth)
    _, plain = gradients(copy.deepcopy(model), torch.bfloat16)
    _, found = gradients(fused_copy(model, level), torch.bfloat16)

    def error(gradient: dict[str, Tensor]) -> float:
        squares = [((gradient[name] - one).square().sum(), one.square().sum()) for name, one in expected.items()]
        return float(sum(off for off, _ in squares) / sum(all_of_it for _, all_of_it in squares)) ** 0.5

    assert error(found) < 1.2 * error(plain)


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_with_dropout_agree_with_finite_differences(level: Recompute) -> None:
    model = fused_copy(model_with(list(LINEAR_MODULES), torch.float64, dropout=0.3), level)
    _, found = gradients(model)
    ids = torch.manual_seed(5) and torch.randint(3, 131, (1, sum(LENGTHS)))
    labels = ids.clone()
    labels[:, :5] = -100

    def loss() -> float:
        torch.manual_seed(5)
        torch.randint(3, 131, (1, sum(LENGTHS)))  # the generator stands where it stood above
        return summed_loss(model, ids, labels, LENGTHS).item()

    for name, parameter in adapter_parameters(model):
        place = (1, 2)
        step, before = 1e-5, parameter.data[place].item()
        parameter.data[place] = before + step
        above = loss()
        parameter.data[place] = before - step
        below = loss()
        parameter.data[place] = before
        expected = (above - below) / (2 * step)
        assert found[name][place].item() == pytest.approx(expected, rel=2e-4, abs=2e-6), name


@pytest.mark.parametrize(
    ("lengths", "changes"),
    [(LENGTHS, {}), ((9, 9, 9), {}), ((300, 2), {}), ((7,), {}), (LENGTHS, ADDED)],
    ids=lambda value: str(value) if isinstance(value, tuple) else "with biases and norms of heads" if value else "",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["", "autocast"])
def test_every_level_gives_the_same_bits_with_dropout_on(
    lengths: tuple[int, ...], changes: dict[str, Any], dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    model = model_with(list(LINEAR_MODULES), dtype, dropout=0.3, **changes)
    runs = [gradients(fused_copy(model, level), autocast, lengths) for level in LEVELS]
    for loss, found in runs[1:]:
        assert loss == runs[0][0]
        assert all(torch.equal(found[name], one) for name, one in runs[0][1].items())


class CountAttention(TorchDispatchMode):
    """How often the attention kernel runs, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = {"forward": 0, "backward": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_flash_attention" in str(func):
            self.calls["backward" if "backward" in str(func) else "forward"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("level", "runs"), [(0, 1), (1, 1), (2, 1), (3, 2)])
def test_attention_runs_again_in_recomputed_blocks_alone(level: int, runs: int) -> None:
    model = fused_copy(model_with(["q_proj"], torch.float32), Recompute(level))
    with CountAttention() as counter:
        gradients(model)
    samples = 3 * len(LENGTHS)  # in each of three layers
    assert counter.calls == {"forward": runs * samples, "backward": samples}


class NamesOfOperators(TorchDispatchMode):
    """The operators that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("level", LEVELS)
def test_no_gradient_of_the_row_is_filled_with_zeros_and_copied(level: Recompute) -> None:
    """The gradient of ``x[0]`` is: 12 more launches a layer."""
    with NamesOfOperators() as names:
        gradients(fused_copy(model_with(list(LINEAR_MODULES), torch.float32), level))
    assert "aten::mm" in names.seen
    assert "aten::select_backward" not in names.seen


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    dropout = Dropout(0.3, seed=4)
    kept, _ = dropout.drop(torch.ones(400, 500))
    assert float((kept == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(kept, dropout.drop(torch.ones(400, 500))[0])
    assert not torch.equal(kept, replace(dropout, first_row=7).drop(torch.ones(400, 500))[0])


def test_without_training_mode_nothing_is_dropped() -> None:
    model = model_with(["q_proj"], torch.float32, dropout=0.9)
    ids = torch.arange(3, 32)[None]
    with torch.no_grad():
        plain = model.eval()(ids)
        apply_activation_checkpointing(model, "none", fused=True)
        torch.testing.assert_close(model(ids), plain, atol=1e-5, rtol=1e-5)


def test_norm_and_its_gradient_against_autograd() -> None:
    norm = RMSNorm(12, 1e-5).double()
    norm.weight.data.uniform_(0.5, 1.5)
    x, grad = torch.randn(23, 12, dtype=torch.float64, requires_grad=True), torch.randn(23, 12, dtype=torch.float64)
    norm(x).backward(grad)
    with torch.no_grad():
        torch.testing.assert_close(operations.normalise(x, norm, torch.float64), norm(x))
        torch.testing.assert_close(operations.normalise_backward(grad, x, norm), x.grad)
        beside = torch.randn_like(x)
        wanted = x.grad + beside
        assert operations.normalise_backward(grad, x, norm, beside, into=beside) is beside
        torch.testing.assert_close(beside, wanted)


def test_norm_of_heads_side_by_side() -> None:
    norm = RMSNorm(4, 1e-5).double()
    norm.weight.data.uniform_(0.5, 1.5)
    x, grad = torch.randn(23, 12, dtype=torch.float64, requires_grad=True), torch.randn(23, 12, dtype=torch.float64)
    heads = norm(x.view(23, 3, 4)).view(23, 12)
    heads.backward(grad)
    with torch.no_grad():
        torch.testing.assert_close(operations.normalise(x, norm, torch.float64), heads)
        assert operations.normalise_backward(grad, x, norm, into=grad) is grad
        torch.testing.assert_close(grad, x.grad)


def test_turning_back_undoes_turning() -> None:
    x = torch.randn(9, 3 * 8, dtype=torch.float64)
    rotation = rotary_angles(torch.arange(9)[None], 8, 10000.0)
    turned, half = x.clone(), x[:, :8].clone()
    operations.rotate_in_place(turned, half, *rotation)
    assert not torch.allclose(turned, x)
    torch.testing.assert_close(half, turned[:, :8])
    torch.testing.assert_close(operations.rotate_back(turned, *rotation), x, atol=1e-6, rtol=1e-6)
