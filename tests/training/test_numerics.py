"""A loss or gradient that is not finite ends the run before it does harm."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import adapter_tensors, files, last_checkpoint, make_spec, metrics
from safetensors.torch import load_file, save_file

from llamatune.errors import NumericsError
from llamatune.training.numerics_faults import numerics_fault
from llamatune.training.train import train


def _rows_with(data: Path, token: int) -> list[int]:
    """Numbers of the kept rows that hold a token, as prepare-data counted them in the input file."""
    tensors = load_file(data / "train.safetensors")
    offsets, ids, rows = tensors["offsets"].tolist(), tensors["input_ids"].tolist(), tensors["source_rows"].tolist()
    return [row for row, a, b in zip(rows, offsets, offsets[1:], strict=False) if token in ids[a:b]]


@pytest.fixture
def rare_token(prepared: Callable[..., Path]) -> int:
    """A token that a few of the rows have."""
    return next(token for token in range(3, 90) if 2 <= len(_rows_with(prepared(), token)) <= 5)


@pytest.fixture
def broken_base(tiny_base: Callable[..., Path], tmp_path: Path, rare_token: int) -> Path:
    """A base with one NaN, in the embedding of the rare token."""
    base = tmp_path / "broken"
    shutil.copytree(tiny_base(), base)
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][rare_token, 3] = float("nan")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base


def test_a_nan_in_the_base_names_step_and_rows_and_saves_nothing(
    broken_base: Path, rare_token: int, prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """One window of all rows, one row in a micro-batch: the message can name the very rows."""
    data, run = prepared(), tmp_path / "run"
    with pytest.raises(NumericsError, match="loss is not finite at step 1, among rows") as raised:
        batches: dict[str, Any] = {"training__micro_batch_size": 1, "training__gradient_accumulation_steps": 23}
        train(make_spec(broken_base, data, run, **batches, training__tokens_per_pass=None))
    message = str(raised.value)
    assert raised.value.exit_code == 6
    assert "float32 weights, fp32" in message
    named = [int(row) for row in message.partition("among rows ")[2].partition(" (")[0].split(", ")]
    assert named == _rows_with(data, rare_token)
    assert not metrics(run)
    assert not {"adapter", "best", "checkpoints", "summary.json"} & {path.name for path in run.iterdir()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_rate_that_explodes_keeps_the_last_good_checkpoint(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, precision: str
) -> None:
    """The first epoch warms up gently; then the rate is absurd. What was saved before stays loadable and finite."""
    run = tmp_path / "run"
    gentle = {"training__save_every_steps": 1, "training__precision": precision, "training__optimizer": "sgd"}
    spec = make_spec(tiny_base(), prepared(), run, **gentle, training__max_steps=2, training__learning_rate=1e-3)
    train(spec)
    (run / "adapter").rename(tmp_path / "earlier")
    before = files(last_checkpoint(run))
    wild = make_spec(tiny_base(), prepared(), run, **gentle, training__max_steps=9, training__learning_rate=1e30,
                     training__max_grad_norm=None)  # fmt: skip
    changed = ("training.learning_rate", "training.max_grad_norm")
    with pytest.raises(NumericsError, match=r"not finite at step [345]|holds|any loss scale") as raised:
        train(wild, allowed_changes=changed)
    assert raised.value.exit_code == 6
    assert not (run / "adapter").exists()
    assert not (run / "summary.json").exists()
    for checkpoint in (run / "checkpoints").iterdir():
        assert all(bool(torch.isfinite(tensor).all()) for tensor in adapter_tensors(checkpoint).values())
    assert files(run / "checkpoints" / "step-000002") == before
    assert str(last_checkpoint(run)) in str(raised.value), "the message tells where the last good checkpoint is"


def test_weights_that_overflow_in_the_last_update_are_not_passed_off_as_a_result(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """The loss was finite, the update was not: nobody would look at the loss again."""
    run = tmp_path / "run"
    spec = make_spec(
        tiny_base(), prepared(), run, training__max_steps=1, training__optimizer="sgd",
        training__learning_rate=3e38, training__max_grad_norm=None, lora={"r": 4, "alpha": 400, "dropout": 0.0},
    )  # fmt: skip
    with pytest.raises(NumericsError) as raised:
        train(spec)
    assert raised.value.exit_code == 6
    assert not (run / "adapter").exists()
    assert not list((run / "checkpoints").glob("step-*"))


def test_a_validation_loss_that_is_not_finite_ends_the_run(
    broken_base: Path, rare_token: int, prepared: Callable[..., Path], tmp_path: Path, tiny_rows: Path
) -> None:
    """Rows that meet the NaN only in validation."""
    lines = tiny_rows.read_text().splitlines(keepends=True)
    bad = _rows_with(prepared(), rare_token)
    (tmp_path / "bad.jsonl").write_text("".join(lines[row - 1] for row in bad))
    (tmp_path / "good.jsonl").write_text("".join(line for n, line in enumerate(lines, 1) if n not in bad))
    split = prepared(tmp_path / "good.jsonl", validation=[tmp_path / "bad.jsonl"], limit=12)
    run = tmp_path / "run"
    with pytest.raises(NumericsError, match="validation loss is not finite at step 4, among validation rows 1, 2"):
        last = {"at_start": False, "every_steps": 3}
        train(make_spec(broken_base, split, run, training__max_steps=3, evaluation=last))
    assert not (run / "best").exists()
    assert not (run / "adapter").exists()
    assert len(metrics(run, "step")) == 3


@pytest.mark.parametrize(
    ("changes", "steps", "advice"),
    [
        ({}, 3, "lower training.learning_rate"),
        ({"training__max_grad_norm": None}, 3, "lower training.learning_rate or set training.max_grad_norm: 1.0"),
        ({"training__precision": "tf32"}, 3, "lower training.learning_rate"),
        ({"training__precision": "bf16"}, 3, "lower training.learning_rate or set training.precision: fp32"),
        ({"training__precision": "fp16"}, 0, "set training.precision: fp32"),
        ({}, 0, "see whether the weights of model.path are broken"),
        ({"lora__init_from": "a"}, 0, "see whether the weights of model.path and lora.init_from are broken"),
        ({"lora": None}, 0, "see whether the weights of model.path are broken"),
    ],
)
def test_the_advice_names_nothing_that_the_spec_has(changes: dict[str, Any], steps: int, advice: str) -> None:
    spec = make_spec(Path("base"), Path("data"), Path("run"), **changes)
    fault = numerics_fault("the loss is not finite", None, spec, steps, Path("run"), None)
    assert str(fault).endswith(f": run: nothing was saved; {advice}")
    assert f"at step {steps + 1} (" in str(fault)
