"""What a step's memory consists of: known tensors by hand, real steps against closed forms and autograd's own hooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import step_meter
import torch
from step_meter import even_batch
from step_tools import saved_by_autograd
from torch import nn

from llamatune.benchmarking.category_meter import CategoryMeter
from llamatune.benchmarking.results import CATEGORIES
from llamatune.errors import OutOfMemory
from llamatune.events import ignore_event, never_stop
from llamatune.model.loss import summed_loss
from llamatune.shapes.gradient_lanes import LANES
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig
from llamatune.spec import RunSpec
from llamatune.spec_sections import TrainingSection
from llamatune.training.model_and_optimizer import Learner, build_learner
from llamatune.training.optimizers.optimizer import SGD, Optimizer
from llamatune.training.training_step import make_update

TINY = LlamaConfig(64, 160, 3, 4, 2, 96)
BATCH = even_batch(2, 40, 0.46)


def spec_of(lora: bool = True, dropout: float = 0.0, **training: Any) -> RunSpec:
    values: dict[str, Any] = {
        "model": {"path": "none", "init": "random", "dtype": "float32"},
        "data": {"train": "none"},
        "training": {"output_dir": "none", "device": "cpu", "precision": "fp32", **training},
    }
    if lora:
        values["lora"] = {"r": 4, "dropout": dropout, "target_modules": list(LINEAR_MODULES)}
    return RunSpec.model_validate(values)


def learner_of(spec: RunSpec) -> Learner:
    """A learner whose optimizer has its state, as after a first step."""
    learner = build_learner(spec, step_meter._inputs_without_data(spec, TINY), ignore_event, never_stop)
    step(learner, 1)
    return learner


def step(learner: Learner, micro_batches: int) -> None:
    lanes = None if len(learner.parameters) == len([*learner.model.parameters()]) else LANES  # as a run has them
    make_update(learner, [BATCH] * micro_batches, TrainingSection(output_dir="none"), 0, 1e-3, lanes=lanes)


def metered(spec: RunSpec, micro_batches: int = 2) -> tuple[Learner, CategoryMeter]:
    learner = learner_of(spec)
    meter = CategoryMeter(learner)
    with meter:
        step(learner, micro_batches)
    return learner, meter


def sizes_ever(meter: CategoryMeter) -> Counter[str]:
    """Bytes of all storages that there were, by category, whenever they lived."""
    sizes: Counter[str] = Counter()
    for storage, change in meter._log:
        if change > 0:
            sizes[storage.category] += change
    return sizes


def alive(meter: CategoryMeter) -> Counter[str]:
    """Bytes of the storages that there are now, by category."""
    sizes: Counter[str] = Counter()
    for storage, change in meter._log:
        sizes[storage.category] += change
    return sizes


class TestKnownTensors:
    """x (20, 50) -> exp(x W^T) -> sum, W (30, 50) trained by SGD with momentum: every storage can be told by hand."""

    @pytest.fixture
    def weight(self) -> nn.Parameter:
        return nn.Parameter(torch.zeros(30, 50))

    @pytest.fixture
    def learner(self, weight: nn.Parameter) -> Any:
        model = nn.Module()
        model.weight = weight
        optimizer = Optimizer({"weight": weight}, SGD(momentum=0.9))
        weight.grad = torch.zeros(30, 50)
        optimizer.step(0.1)
        optimizer.zero_grad()
        return SimpleNamespace(
            model=model, optimizer=optimizer, parameters={"weight": weight}, device=torch.device("cpu")
        )

    def test_each_storage_has_the_category_that_it_has_by_hand(self, learner: Any, weight: nn.Parameter) -> None:
        with CategoryMeter(learner) as meter:
            x = torch.ones(20, 50)
            hidden = x @ weight.t()
            grown = hidden.exp()  # what exp's backward needs
            del hidden
            shift = torch.ones(20, 30).neg()  # neg's input is freed, its result is kept by nobody
            del shift
            loss = grown.sum()
            del x, grown
            loss.backward()
        assert meter.live_bytes == 4 * (2 * 30 * 50 + 30 * 50 + 1)  # weight, momentum, gradient, loss
        ever = sizes_ever(meter)
        assert ever["parameters"] == ever["optimizer"] == ever["gradients"] == 4 * 30 * 50
        # x, exp(x W^T), the loss, and the 1 that its gradient starts from
        assert ever["activations"] == 4 * (20 * 50 + 20 * 30 + 2)
        # The product, the two of the shift, and the gradient of the product.
        assert ever["temporary"] == 4 * (20 * 30 + 2 * 20 * 30 + 20 * 30)
        assert meter.categories() == {
            "parameters": 6000,
            "gradients": 6000,
            "optimizer": 6000,
            "activations": 4 * (20 * 50 + 2),  # exp's result went when its backward was done
            "casts": 0,
            "temporary": 4 * 20 * 30,
        }

    def test_a_copy_of_a_weight_in_16_bits_is_no_activation(self, learner: Any, weight: nn.Parameter) -> None:
        x = torch.ones(20, 50, requires_grad=True)
        meter = CategoryMeter(learner)
        meter.assign("temporary", [x])
        with meter, torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.linear(x, weight).sum()
            loss.backward()
        ever = sizes_ever(meter)
        assert ever["casts"] == 2 * 30 * 50
        assert ever["activations"] == 2 * 20 * 50 + 2 * loss.element_size()  # x in 16 bits, the loss, the 1

    def test_an_older_storage_that_nobody_named_is_temporary(self, learner: Any, weight: nn.Parameter) -> None:
        room = torch.zeros(500)
        with CategoryMeter(learner) as meter:
            before = meter.live_bytes
            room.add_(1)
            view = room[:10]
            assert meter.live_bytes == before + 2000
            (weight.sum() + view.sum()).backward()
        assert sizes_ever(meter)["temporary"] >= 2000
        assert not any(storage.category == "activations" and size == 2000 for storage, size in meter._log)

    def test_the_limit_is_kept_to_the_byte(self, learner: Any, weight: nn.Parameter) -> None:
        held = 4 * 2 * 30 * 50
        with CategoryMeter(learner, limit_bytes=held + 4000):
            torch.zeros(1000)
        with pytest.raises(OutOfMemory, match=r"16,000 bytes are allowed, 16,004 would be held"):  # noqa: SIM117
            with CategoryMeter(learner, limit_bytes=held + 4000):
                torch.zeros(1001)
        with pytest.raises(OutOfMemory):
            CategoryMeter(learner, limit_bytes=held - 1)

    def test_where_an_allocator_tells_the_peak_its_operation_is_the_peak(
        self, learner: Any, weight: nn.Parameter
    ) -> None:
        allocated = iter([20_000, 20_000, 90_000, 90_000, 90_000])  # the third one had much inside itself
        with CategoryMeter(learner, allocator_peak=lambda: next(allocated)) as meter:
            x = torch.zeros(100)
            y = torch.zeros(200)
            del y
            z = x.exp()
            del z
            torch.zeros(1000)
        assert meter.peak_bytes == 12_000 + 400 + 4000
        assert sum(meter.categories().values()) == 12_000 + 400 + 400


SETTINGS = [
    (lora, precision, mode, fused)
    for lora in (True, False)
    for precision in ("fp32", "bf16")
    for mode, fused in (("none", True), ("none", False), ("block", True), ("every_2", False), ("sublayer", True))
]


@pytest.mark.parametrize(("lora", "precision", "mode", "fused"), SETTINGS)
def test_categories_add_up_to_the_peak_and_to_closed_forms(lora: bool, precision: str, mode: str, fused: bool) -> None:
    spec = spec_of(lora, precision=precision, activation_checkpointing=mode, fused=fused)
    learner, meter = metered(spec)
    found = meter.categories()
    assert tuple(found) == CATEGORIES
    assert sum(found.values()) == meter.peak_bytes
    assert found["parameters"] == 4 * sum(p.numel() for p in learner.model.parameters())
    trained = 4 * sum(p.numel() for p in learner.parameters.values())
    counters = 4 * len(learner.parameters)
    assert found["optimizer"] == 2 * trained + counters
    # Of two passes an adapter's gradients are added in two lanes.
    assert trained <= sizes_ever(meter)["gradients"] <= (2.02 if lora else 1.01) * trained
    assert found["gradients"] <= (2 if lora else 1) * trained
    assert found["activations"] > 0


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fused", [True, False])
def test_activations_and_casts_are_what_autograd_says_it_saves(lora: bool, precision: str, fused: bool) -> None:
    spec = spec_of(lora, dropout=0.1, precision=precision, fused=fused)
    _, meter = metered(spec, 1)
    ever = sizes_ever(meter)
    expected = saved_by_autograd(learner_of(spec), BATCH)
    # Alive but not saved: ids and positions, the angles that all blocks share (each in two dtypes), the loss.
    shared = 80 * 8 * 8 + 2 * 80 * TINY.head_dim * (4 + 2)
    batch = 80 * 8  # saved by a trained embedding, but older than the step
    casts = 2 * sum(elements_that_backward_needs(lora)) if precision == "bf16" and not (lora and fused) else 0
    assert expected - batch <= ever["activations"] + casts <= expected + shared


def elements_that_backward_needs(lora: bool) -> Iterator[int]:
    """The matrices whose input needs a gradient: all, and the head; with LoRA (r 4) a frozen head makes its gradient
    at once, the first block's q, k and v have an input that needs none, and every B has one that does."""
    if not lora:
        yield TINY.vocab_size * TINY.hidden_size
    for layer in range(TINY.num_hidden_layers):
        for module in LINEAR_MODULES:
            out_features, in_features = TINY.linear_shape(module)
            yield 4 * out_features if lora else 0
            if not lora or layer or module not in ("q_proj", "k_proj", "v_proj"):
                yield (out_features + (4 if lora else 0)) * in_features


def test_autocast_keeps_frozen_fp32_weights_in_16_bits_and_the_fused_blocks_one_at_a_time() -> None:
    _, plain = metered(spec_of(precision="bf16", fused=False), 1)
    # The peak is in the loss: its copy of the head is there, and autocast's cache holds the first block's A as well.
    more = TINY.vocab_size * TINY.hidden_size + 3 * 4 * TINY.hidden_size
    assert plain.categories()["casts"] == 2 * (sum(elements_that_backward_needs(True)) + more)
    _, fused = metered(spec_of(precision="bf16", fused=True), 1)
    assert fused.categories()["casts"] <= 2 * TINY.intermediate_size * TINY.hidden_size
    _, exact = metered(spec_of(precision="fp32", fused=False), 1)
    assert sizes_ever(exact)["casts"] == 0


def test_what_autocasts_cache_holds_is_there_until_the_forward_pass_ends() -> None:
    """With checkpointing no cast is saved for the backward pass, but all of trained weights are there at once."""
    learner = learner_of(spec_of(False, precision="bf16", activation_checkpointing="block"))
    with CategoryMeter(learner) as meter:
        with learner.autocast():
            loss = summed_loss(learner.model, BATCH.input_ids, BATCH.labels, BATCH.lengths)
            held = alive(meter)["casts"]
        kept = alive(meter)["casts"]
    head = TINY.vocab_size * TINY.hidden_size
    assert held == 2 * sum(elements_that_backward_needs(False))
    assert kept == 2 * head, "of which no block is part"
    assert loss.requires_grad


def test_what_is_recomputed_is_activation_again() -> None:
    """A block's recomputation is alive within the backward pass, so the peak has more of it than was kept."""
    _, kept = metered(spec_of(False, activation_checkpointing="none"), 1)
    _, again = metered(spec_of(False, activation_checkpointing="block"), 1)
    made, made_again = sizes_ever(kept)["activations"], sizes_ever(again)["activations"]
    inputs = TINY.num_hidden_layers * 80 * TINY.hidden_size * 4
    assert made <= made_again <= made + 2 * inputs
    assert again.categories()["activations"] < kept.categories()["activations"]
