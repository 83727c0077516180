"""Loss and gradient do not depend on how rows are split into micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference_run import collate, kept_rows, summed_cross_entropy
from run_tools import adapter_tensors, losses, make_spec, metrics
from torch import Tensor

from llamatune.checkpoints.loading import load_model
from llamatune.data.batches import open_prepared
from llamatune.model.adapters.apply import adapter_parameters, apply_adapter
from llamatune.model.loss import summed_loss
from llamatune.shapes.adapter import AdapterSpec
from llamatune.training.train import train

SIZES = [1, 2, 3, 4, 5, 6, 7, 12]  # of 12 rows: 5 and 7 leave an uneven last one
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


@pytest.fixture(scope="module")
def twelve(prepared: Callable[..., Path]) -> Path:
    """Twelve ragged rows, one of them cut."""
    return prepared(limit=15)


def _gradients(base: Path, data: Path, size: int, dtype: torch.dtype, lora: bool) -> tuple[float, dict[str, Tensor]]:
    model, split = load_model(base, dtype, writable=True), open_prepared(data).train
    if lora:
        apply_adapter(model, AdapterSpec(4, 8, 0.0, tuple(TARGETS)), seed=1)
        torch.manual_seed(2)
        for name, parameter in adapter_parameters(model):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, 0.0, 0.2)
        model.to(dtype)
    else:
        model.requires_grad_(True)
    total, targets = 0.0, sum(split.target_counts)
    for batch in split.batches(size):
        loss = summed_loss(model, batch.input_ids, batch.labels, batch.lengths) / targets
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_every_split_gives_the_same_loss_and_gradient(
    tiny_base: Callable[..., Path], twelve: Path, dtype: torch.dtype, tolerance: float, lora: bool
) -> None:
    assert len(open_prepared(twelve).train) == 12
    expected_loss, expected = _gradients(tiny_base(), twelve, 12, dtype, lora)
    assert len(expected) == (2 * len(TARGETS) * 3 if lora else 30)
    worst: dict[str, float] = {}
    for size in SIZES[:-1]:
        loss, gradients = _gradients(tiny_base(), twelve, size, dtype, lora)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            worst[name] = max(worst.get(name, 0.0), _relative(gradient, expected[name]))
    assert max(worst.values()) < tolerance, sorted(worst.items(), key=lambda found: -found[1])[:3]


def test_the_loss_is_that_of_transformers_over_target_tokens(tiny_base: Callable[..., Path], twelve: Path) -> None:
    from transformers import LlamaForCausalLM

    model, split = load_model(tiny_base()), open_prepared(twelve).train
    batch = split.batch(range(12))
    reference = LlamaForCausalLM.from_pretrained(tiny_base())
    with torch.no_grad():
        expected = summed_cross_entropy(reference, collate(kept_rows(twelve)))
        torch.testing.assert_close(
            summed_loss(model, batch.input_ids, batch.labels, batch.lengths), expected, rtol=1e-6, atol=0
        )
    assert batch.target_tokens == sum(label != -100 for _, labels in kept_rows(twelve) for label in labels)


@pytest.mark.parametrize("size", SIZES)
def test_one_update_is_the_same_for_every_split(
    tiny_base: Callable[..., Path], twelve: Path, tmp_path: Path, size: int
) -> None:
    """Through the whole loop, SGD at 1: the weights' change is the gradient. 7 x 2 is more than there are rows."""

    def run(name: str, size: int) -> tuple[float, int, dict[str, Tensor]]:
        spec = make_spec(
            tiny_base(), twelve, tmp_path / name, lora={"r": 4, "alpha": 8, "dropout": 0.0}, training__max_steps=1,
            training__micro_batch_size=size, training__gradient_accumulation_steps=-(-12 // size),
            training__optimizer="sgd", training__learning_rate=1.0, training__max_grad_norm=None,
        )  # fmt: skip
        train(spec)
        return (
            losses(tmp_path / name)[0],
            metrics(tmp_path / name)[0]["target_tokens"],
            adapter_tensors(tmp_path / name / "adapter"),
        )

    (loss, targets, weights), (whole_loss, whole_targets, whole) = run("split", size), run("whole", 12)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert targets == whole_targets
    updated = [name for name in whole if "lora_B" in name]  # B started at zero, so A has no gradient yet
    assert all(_relative(weights[name], whole[name]) < 1e-5 for name in updated)
    assert all(torch.equal(weights[name], whole[name]) for name in whole.keys() - set(updated))


def test_the_partial_window_at_an_epochs_end_counts_its_own_tokens(
    tiny_base: Callable[..., Path], twelve: Path, tmp_path: Path
) -> None:
    """12 rows in windows of 5: the third window has 2 rows, and the fourth belongs to the next epoch."""
    spec = make_spec(
        tiny_base(), twelve, tmp_path / "run", data__shuffle=False, training__num_epochs=2,
        training__micro_batch_size=1, training__gradient_accumulation_steps=5,
    )  # fmt: skip
    summary = train(spec)
    counts = [sum(label != -100 for label in labels) for _, labels in kept_rows(twelve)]
    expected = [sum(counts[:5]), sum(counts[5:10]), sum(counts[10:])] * 2
    lines = metrics(tmp_path / "run", "step")
    assert [line["target_tokens"] for line in lines] == expected
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    for epoch in (0, 1):
        part = lines[3 * epoch : 3 * epoch + 3]
        mean = sum(line["loss"] * line["target_tokens"] for line in part) / sum(expected[:3])
        assert summary["epochs"][epoch]["train_loss"] == pytest.approx(mean, rel=1e-9)
    assert summary["train_loss"] == summary["epochs"][-1]["train_loss"]
