"""Every epoch is a permutation of the rows, and validation sees no dropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_run import collate, kept_rows, summed_cross_entropy
from run_tools import StopAfter, make_spec, metrics

from llamatune.data.batches import Batch, Split
from llamatune.data.packing import epoch_rows
from llamatune.errors import Stopped
from llamatune.training.train import train


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Source rows of every batch that was made."""
    seen: list[tuple[int, ...]] = []
    make = Split.batch

    def record(self: Split, indices: list[int]) -> Batch:
        batch = make(self, indices)
        seen.append(batch.rows)
        return batch

    monkeypatch.setattr(Split, "batch", record)
    return seen


@pytest.mark.parametrize("rows", [1, 2, 23, 1000])
def test_every_epoch_is_another_permutation_of_the_seed(rows: int) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(sample for (sample,) in epoch_rows([1] * rows, seed, epoch, shuffle=True, budget=None))

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(rows)) for order in orders)
    assert order(1, 2) == orders[-1]
    if rows > 2:
        assert len(set(orders)) == 6


def test_every_row_is_used_once_an_epoch_across_restarts(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, visited: list[tuple[int, ...]]
) -> None:
    changes: dict[str, Any] = {"training__num_epochs": 3, "training__tokens_per_pass": None}
    spec = make_spec(tiny_base(), prepared(), tmp_path / "run", **changes)
    for count in (1, 3, 2, 5, 99):
        stop = StopAfter(count)
        try:
            train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
        except Stopped:
            continue
    rows = [row for batch in visited for row in batch]
    epochs = [rows[start : start + 23] for start in range(0, len(rows), 23)]
    assert len(epochs) == 3
    assert all(sorted(epoch) == sorted(set(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(batch) for batch in visited[:8]] == [3, 3, 3, 3, 3, 3, 3, 2]


def test_without_shuffling_rows_come_in_the_files_order(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, visited: list[tuple[int, ...]]
) -> None:
    train(make_spec(tiny_base(), prepared(), tmp_path / "run", data__shuffle=False))
    rows = [row for batch in visited for row in batch]
    assert rows == sorted(rows)
    assert len(rows) == 23


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_validation_loss_is_that_of_peft_without_dropout(
    tiny_base: Callable[..., Path],
    peft_adapter: Callable[..., Path],
    prepared: Callable[..., Path],
    tmp_path: Path,
    precision: str,
) -> None:
    """A strong adapter under strong dropout, and a rate of almost nothing: evaluation sees the adapter as it was."""
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    data, adapter = prepared(validation_fraction=0.25, seed=3), peft_adapter(tiny_base(), r=4, alpha=8, scale=0.2)
    lora = {"r": 4, "alpha": 8, "dropout": 0.9, "target_modules": "all-linear", "init_from": str(adapter)}
    train(
        make_spec(
            tiny_base(), data, tmp_path / "run", training__max_steps=1, training__learning_rate=1e-12, lora=lora,
            training__precision=precision,
        )
    )  # fmt: skip
    rows = kept_rows(data, "validation")
    assert len(rows) > 3, "more than one batch"
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_base()), adapter).eval()
    with torch.no_grad():
        total = summed_cross_entropy(model, collate(rows)).item()
    expected = total / sum(label != -100 for _, labels in rows for label in labels)
    lines = metrics(tmp_path / "run", "eval")
    assert [line["step"] for line in lines] == [0, 1]
    for line in lines:
        assert line["loss"] == pytest.approx(expected, rel=1e-6 if precision == "fp32" else 0.02)
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))


def test_validation_rows_of_another_directory_take_the_place_of_the_split(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    own, other = prepared(validation_fraction=0.25, seed=3), prepared(limit=12)
    train(make_spec(tiny_base(), own, tmp_path / "own", training__max_steps=1))
    train(make_spec(tiny_base(), own, tmp_path / "other", training__max_steps=1, data__validation=str(other)))
    train(make_spec(tiny_base(), other, tmp_path / "none", training__max_steps=1))
    losses = [[line["loss"] for line in metrics(tmp_path / name, "eval")] for name in ("own", "other", "none")]
    assert [len(found) for found in losses] == [2, 2, 0]
    assert losses[0] != losses[1]
