"""Runs that versions without passes began: they go on in their own order of addition, to those versions' bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import StopAfter, assert_same_outcome, keep_epochs_in_state, last_checkpoint, make_spec, outcome, rewrite
from torch import Tensor

from llamatune.checkpoints.training_checkpoint import read_run_state
from llamatune.errors import CheckpointError, Stopped
from llamatune.formats.manifest import OtherVersion
from llamatune.spec import RunSpec
from llamatune.training import train as train_module
from llamatune.training import window_gradients
from llamatune.training.passes import PassRule
from llamatune.training.train import train


@pytest.fixture
def spec_at(small_base: Path, rows_of: Callable[[int], Path], tmp_path: Path) -> Callable[[str], RunSpec]:
    changes: dict[str, Any] = {
        "training__micro_batch_size": 2, "training__gradient_accumulation_steps": 4, "training__max_steps": 14,
    }  # fmt: skip
    return lambda name: make_spec(small_base, rows_of(91), tmp_path / name, **changes)


def stop_after(spec: RunSpec, steps: int) -> Path:
    stop = StopAfter(steps)
    with pytest.raises(Stopped):
        train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    return Path(spec.training.output_dir)


def begin_as_before(spec: RunSpec, monkeypatch: pytest.MonkeyPatch, steps: int) -> Path:
    """Begin a run in the old order, and leave its directory as the old versions did."""
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "choose_passes", lambda *arguments: PassRule(lanes=None))
        run = stop_after(spec, steps)
    origin = json.loads((run / "origin.json").read_text())
    del origin["passes"]
    (run / "origin.json").write_text(json.dumps(origin))
    for checkpoint in (run / "checkpoints").iterdir():
        rewrite(checkpoint, lambda state: state.update(schema=1))
    keep_epochs_in_state(last_checkpoint(run), schema=1)
    return run


def sum_by_autograd(learner: Any, passes: Any, seed: int, window: int, *rest: Any) -> Any:
    """The old versions' window: each micro-batch a pass, every gradient added to ``grad`` by autograd itself."""
    losses, targets = [], sum(batch.target_tokens for batch in passes)
    for index, batch in enumerate(passes):
        torch.manual_seed(window_gradients.derived_seed(seed, "dropout", window, index))
        with learner.autocast():
            loss: Tensor = window_gradients.summed_loss(learner.model, batch.input_ids, batch.labels, batch.lengths)
        (loss / (targets / learner.scaler.scale)).backward()
        losses.append(loss.detach().double())
    return window_gradients.WindowFacts(torch.stack(losses), [], sum(batch.tokens for batch in passes))


def test_an_old_run_ends_in_the_bytes_of_the_old_order(
    spec_at: Callable[[str], RunSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "choose_passes", lambda *arguments: PassRule())
        patch.setattr("llamatune.training.training_step.window_gradients", sum_by_autograd)
        train(spec_at("reference"))
    begin_as_before(spec_at("old"), monkeypatch, 5)
    train(spec_at("old"))
    assert_same_outcome(tmp_path / "old", tmp_path / "reference")
    assert json.loads((tmp_path / "old" / "origin.json").read_text())["passes"]["lanes"] is None
    train(spec_at("new"))  # the control: today's order has other bytes
    assert outcome(tmp_path / "new")["optimizer"] != outcome(tmp_path / "old")["optimizer"]


def test_an_old_run_keeps_its_order_over_several_stops(
    spec_at: Callable[[str], RunSpec], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begin_as_before(spec_at("often"), monkeypatch, 4)
    stop_after(spec_at("often"), 3)
    train(spec_at("often"))
    begin_as_before(spec_at("once"), monkeypatch, 9)
    train(spec_at("once"))
    assert_same_outcome(tmp_path / "often", tmp_path / "once")


def test_a_checkpoint_of_a_later_version_is_refused(spec_at: Callable[[str], RunSpec]) -> None:
    """As old versions refuse this one's, whose schema is 3."""
    run = stop_after(spec_at("run"), 3)
    assert json.loads((last_checkpoint(run) / "state.json").read_text())["schema"] == 3
    rewrite(last_checkpoint(run), lambda state: state.update(schema=4))
    before = last_checkpoint(run)
    with pytest.raises(OtherVersion):
        read_run_state(before)
    with pytest.raises(OtherVersion):
        train(spec_at("run"))
    assert last_checkpoint(run) == before


@pytest.mark.parametrize("passes", [[], {"tokens": 8}, {"tokens": 0, "at_least": 1, "lanes": 8},
                                    {"tokens": None, "at_least": 1, "lanes": 6}])  # fmt: skip
def test_passes_that_were_edited_are_refused(spec_at: Callable[[str], RunSpec], passes: object) -> None:
    run = stop_after(spec_at("run"), 2)
    origin = json.loads((run / "origin.json").read_text())
    (run / "origin.json").write_text(json.dumps({**origin, "passes": passes}))
    with pytest.raises(CheckpointError, match="passes"):
        train(spec_at("run"))
