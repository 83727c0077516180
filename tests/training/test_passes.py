"""Passes: how micro-batches are joined, that the gradient stays the same, and that a run keeps its passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_tools import StopAfter, assert_same_outcome, make_spec
from torch import Tensor

from llamatune.errors import CheckpointError, Stopped
from llamatune.events import ignore_event, never_stop
from llamatune.formats.origin_json import Passes, dump_origin
from llamatune.ranks import ALONE
from llamatune.shapes.gradient_lanes import LANES
from llamatune.spec import RunSpec
from llamatune.training.inputs import open_inputs
from llamatune.training.model_and_optimizer import Learner, build_learner
from llamatune.training.passes import PassRule, join_micro_batches
from llamatune.training.schedule import Schedule, pass_tokens
from llamatune.training.stopping import Stopping
from llamatune.training.train import train
from llamatune.training.window_gradients import window_gradients

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(sizes=SIZES, tokens=st.integers(1, 2000), at_least=st.integers(1, 16))
def test_each_micro_batch_is_in_one_pass_within_the_limits(sizes: list[int], tokens: int, at_least: int) -> None:
    passes = join_micro_batches(sizes, PassRule(tokens, at_least))
    assert sorted(index for joined in passes for index in joined) == list(range(len(sizes)))
    assert passes == sorted(map(sorted, passes))
    assert len(passes) >= min(at_least, len(sizes))
    assert all(len(joined) == 1 or sum(sizes[index] for index in joined) <= tokens for joined in passes)


@given(sizes=SIZES)
def test_without_a_number_each_micro_batch_is_a_pass(sizes: list[int]) -> None:
    assert join_micro_batches(sizes, PassRule()) == [[index] for index in range(len(sizes))]


def test_passes_have_nearly_equal_tokens() -> None:
    passes = join_micro_batches([100, 90, 50, 40, 30, 20, 10, 10], PassRule(200))
    assert [sum([100, 90, 50, 40, 30, 20, 10, 10][index] for index in joined) for joined in passes] == [180, 170]
    assert len(join_micro_batches([300] * 8, PassRule(600, at_least=3))) == 4


@pytest.fixture
def spec(tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path) -> Callable[..., RunSpec]:
    """Windows of six micro-batches of two rows; 23 rows, so the last window of an epoch has fewer."""
    changes: dict[str, Any] = {"training__micro_batch_size": 2, "training__gradient_accumulation_steps": 6}
    return lambda name="run", **more: make_spec(tiny_base(), prepared(), tmp_path / name, **{**changes, **more})


def gradients(learner: Learner, schedule: Schedule, window: int, rule: PassRule) -> tuple[float, dict[str, Tensor]]:
    facts = window_gradients(learner, schedule.passes(window, rule), 0, window, rule.lanes, Stopping(), ALONE)
    found = {name: p.grad.clone() for name, p in learner.parameters.items() if p.grad is not None}
    learner.optimizer.zero_grad()
    return float(facts.losses.sum()), found


@pytest.mark.parametrize("lora", [{"r": 4, "alpha": 8, "dropout": 0.0}, None], ids=["lora", "full"])
@pytest.mark.parametrize("packing", [False, True])
def test_joined_passes_have_the_gradient_of_single_ones(
    spec: Callable[..., RunSpec], lora: dict[str, Any] | None, packing: bool
) -> None:
    run = spec(lora=lora, data__packing=packing, data__packed_tokens=60)
    inputs = open_inputs(run, False, ignore_event)
    schedule, learner = Schedule(run, inputs.prepared.train), build_learner(run, inputs, ignore_event, never_stop)
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            if "lora_B" in name:  # at zero it hides A's gradient
                torch.manual_seed(0)
                torch.nn.init.normal_(parameter, 0, 0.1)
    for window in range(schedule.windows_per_epoch):
        loss, single = gradients(learner, schedule, window, PassRule())
        for rule in (PassRule(100), PassRule(10_000), PassRule(10_000, at_least=3), PassRule(lanes=None)):
            joined_loss, joined = gradients(learner, schedule, window, rule)
            assert joined_loss == pytest.approx(loss, rel=1e-6)
            assert joined.keys() == single.keys()
            for name, expected in single.items():
                assert float((joined[name] - expected).norm() / expected.norm()) < 1e-5, name


def test_passes_are_recorded_and_a_resumed_run_keeps_them_whatever_memory_is_free(
    spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    more = {"training__num_epochs": 3, "training__memory_limit": "1GiB"}
    train(spec("whole", **more))
    stop = StopAfter(2)
    with pytest.raises(Stopped):
        train(spec("parts", **more), on_event=stop.on_event, should_stop=stop.should_stop)
    recorded = json.loads((tmp_path / "parts" / "origin.json").read_text())["passes"]
    assert recorded == {"tokens": 2048, "at_least": 1, "lanes": LANES}
    train(spec("parts", **{**more, "training__memory_limit": "1KiB"}))
    assert json.loads((tmp_path / "parts" / "origin.json").read_text())["passes"] == recorded
    assert_same_outcome(tmp_path / "whole", tmp_path / "parts")


def test_without_room_passes_are_as_large_as_the_heaviest_micro_batch(
    spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    run = spec(training__memory_limit="1KiB", training__max_steps=1)
    lengths = sorted(open_inputs(run, False, ignore_event).prepared.train.lengths)
    train(run)
    assert json.loads((tmp_path / "run" / "origin.json").read_text())["passes"]["tokens"] == sum(lengths[-2:])


@pytest.mark.parametrize(
    ("lora", "wanted", "recorded"),
    [({"r": 4}, None, (None, 1, LANES)), ({"r": 4}, 99, (99, 1, LANES)), (None, 99, (99, 1, None))],
)
def test_what_the_spec_names_is_recorded(
    spec: Callable[..., RunSpec], tmp_path: Path, lora: Any, wanted: int | None, recorded: tuple[int | None, ...]
) -> None:
    train(spec(lora=lora, training__tokens_per_pass=wanted, training__max_steps=1))
    passes = json.loads((tmp_path / "run" / "origin.json").read_text())["passes"]
    assert tuple(passes.values()) == recorded


def test_a_run_without_recorded_passes_adds_gradients_one_after_another() -> None:
    assert PassRule.restored(None) == PassRule(None, 1, None)
    assert PassRule.restored(Passes(tokens=5, at_least=2, lanes=16)) == PassRule(5, 2, 16)


@pytest.mark.parametrize(
    "edited",
    [
        5, [], {}, {"tokens": 5}, {"tokens": 0, "at_least": 1, "lanes": 8}, {"tokens": 5, "at_least": 1, "lanes": 6},
        {"tokens": True, "at_least": 1, "lanes": 8}, {"tokens": 5, "at_least": None, "lanes": 8},
        {"tokens": 5, "at_least": 1, "lanes": -8}, {"tokens": 2.5, "at_least": 1, "lanes": 8},
        {"tokens": 5, "at_least": 1 << 60, "lanes": 8}, {"tokens": 5, "at_least": 1, "lanes": 8, "more": 1},
        {"tokens": 5, "at_least": 1, "lanes": False}, {"tokens": 5, "at_least": 1, "lanes": 1 << 30},
    ],
)  # fmt: skip
def test_edited_passes_are_refused(edited: Any) -> None:
    with pytest.raises(CheckpointError, match="passes"):
        dump_origin(Path("origin.json"), {"base": "b", "train": "t", "validation": None, "passes": edited})


def test_the_tokens_of_an_average_pass(spec: Callable[..., RunSpec]) -> None:
    run = spec()
    rows = open_inputs(run, False, ignore_event).prepared.train
    mean = sum(rows.lengths) / len(rows)
    assert pass_tokens(run, rows, PassRule()) == pytest.approx(2 * mean)
    assert pass_tokens(run, rows, PassRule(1 << 20)) == pytest.approx(12 * mean)
    assert pass_tokens(run, rows, PassRule(1 << 20, at_least=4)) == pytest.approx(3 * mean)
    assert pass_tokens(run, rows, PassRule(1)) == pytest.approx(2 * mean)
