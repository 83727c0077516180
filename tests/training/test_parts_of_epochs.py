"""Runs that end inside an epoch: their updates, the samples of each, how they grow, and what the rate does then."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_run import schedule_value
from run_tools import assert_same_outcome, make_spec, metrics, run_and_record

from llamatune.data.packing import epoch_rows
from llamatune.events import EpochDone, Event, Notice, RunStarted, Step
from llamatune.spec import RunSpec
from llamatune.spec_sections import TrainingSection
from llamatune.training.schedule import Schedule, rate_jump
from llamatune.training.train import plan_training, train


@pytest.fixture
def spec_with(tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path) -> Callable[..., RunSpec]:
    """18 rows in windows of 6 make an epoch of 3 steps; 5 rows are held out."""
    data = prepared(validation_fraction=0.25, seed=3)
    return lambda name="run", **changes: make_spec(tiny_base(), data, tmp_path / name, **changes)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 350),
    st.booleans(),
    st.booleans(),
)
def test_the_samples_are_those_that_counting_in_whole_numbers_finds(
    lengths: list[int], micro: int, accumulation: int, hundredths: int, packing: bool, shuffle: bool
) -> None:
    spec = make_spec(
        Path("base"), Path("data"), Path("run"), data__packing=packing, data__packed_tokens=10, data__shuffle=shuffle,
        training__micro_batch_size=micro, training__gradient_accumulation_steps=accumulation,
        training__num_epochs=hundredths / 100,
    )  # fmt: skip
    train_rows: Any = SimpleNamespace(lengths=lengths)
    schedule = Schedule(spec, train_rows)
    windows: list[list[int]] = []
    for epoch in range(4):
        rows, size = epoch_rows(lengths, 0, epoch, shuffle, 10 if packing else None), micro * accumulation
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        windows += [[sample for row in part for sample in row] for part in parts]
    count = next(count for count in itertools.count(1) if 100 * count >= hundredths * len(parts))
    assert schedule.total_steps == count
    assert [list(itertools.chain(*schedule.samples(window))) for window in range(count)] == windows[:count]


def _epochs_told(events: list[Event]) -> list[tuple[float, float]]:
    return [(event.epoch, event.num_epochs) for event in events if isinstance(event, EpochDone)]


def test_half_an_epoch_grows_to_one_and_a_half_as_if_it_had_been_planned_so(
    spec_with: Callable[..., RunSpec], tmp_path: Path
) -> None:
    """Of 3 windows an epoch 2 are half of one, and 5 one and a half. A constant rate has nothing to tell."""
    often: dict[str, Any] = {"training__save_every_steps": 1, "evaluation__every_steps": 1}
    half, events = run_and_record(spec_with("grown", training__num_epochs=0.5, **often))
    assert (half["steps"], _epochs_told(events)) == (2, [(1, 0.5)])
    (started,) = [event for event in events if isinstance(event, RunStarted)]
    assert (started.total_steps, started.num_epochs) == (2, 0.5)
    grown, events = run_and_record(spec_with("grown", training__num_epochs=1.5, **often))
    assert (grown["steps"], _epochs_told(events)) == (5, [(1, 1.5), (2, 1.5)])
    assert not [event for event in events if isinstance(event, Notice) and "jumps" in event.message]
    planned = spec_with("planned", training__num_epochs=1.5, **often)
    facts = plan_training(planned)
    assert (facts["num_epochs"], facts["windows_per_epoch"], facts["total_steps"]) == (1.5, 3, 5)
    train(planned)
    assert_same_outcome(tmp_path / "grown", tmp_path / "planned")


def test_a_cosine_run_that_grows_tells_what_its_rate_jumps_from_and_to(
    spec_with: Callable[..., RunSpec], tmp_path: Path
) -> None:
    cosine: dict[str, Any] = {"training__lr_scheduler": "cosine", "training__learning_rate": 0.01}
    train(spec_with(training__num_epochs=1, **cosine))
    _, events = run_and_record(spec_with(training__num_epochs=2, **cosine))
    last = schedule_value("cosine", 0.01, 0.0, 0, 3, 3)
    following = schedule_value("cosine", 0.01, 0.0, 0, 6, 4)
    (told,) = [event for event in events if isinstance(event, Notice) and event.kind == "warning"]
    assert told.message.startswith(f"the learning rate jumps from {last:.3g} at step 3 to {following:.3g} at step 4,")
    assert "cosine over 6 steps" in told.message
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run", "step")]
    assert rates[2:4] == pytest.approx([last, following])


def _made(section: TrainingSection, steps: int, total: int) -> list[Step]:
    rate = schedule_value(section.lr_scheduler, section.learning_rate, 0.0, section.warmup_steps, total, steps)
    return [Step(steps, steps, 0.0, 1.0, rate, 1.0, 1.0, 1, 1.0, 1, 1.0)]


@pytest.mark.parametrize(
    ("values", "made", "before", "now", "told"),
    [
        ({"lr_scheduler": "linear"}, 10, 10, 20, "from 0.1 at step 10 to 0.5 at step 11"),
        ({"lr_scheduler": "cosine"}, 5, 10, 20, "from 0.655 at step 5 to 0.854 at step 6"),
        ({"lr_scheduler": "linear", "warmup_steps": 4}, 10, 10, 16, "from 0.167 at step 10 to 0.5 at step 11"),
        ({"lr_scheduler": "constant"}, 10, 10, 20, None),
        ({"lr_scheduler": "cosine"}, 5, 10, 10, None),
        ({"lr_scheduler": "cosine"}, 10, 10, 10, None),
        ({"lr_scheduler": "cosine", "warmup_steps": 6}, 5, 10, 20, None),  # still warming up
    ],
)
def test_a_jump_is_told_where_the_rate_that_was_is_not_the_specs(
    values: dict[str, Any], made: int, before: int, now: int, told: str | None
) -> None:
    section = TrainingSection.model_validate({"output_dir": "x", "learning_rate": 1.0, **values})
    found = rate_jump(section, _made(section, made, before), now)
    assert (found is None) == (told is None)
    assert told is None or told in (found or "")
    assert rate_jump(section, [], now) is None


def test_more_epochs_than_the_default_are_a_longer_run(spec_with: Callable[..., RunSpec]) -> None:
    changes = {"training__gradient_accumulation_steps": 10_000, "training__num_epochs": None}
    assert train(spec_with(**changes))["steps"] == 5
    assert train(spec_with(**{**changes, "training__num_epochs": 5}))["steps"] == 5
    assert train(spec_with(**{**changes, "training__num_epochs": 5.5}))["steps"] == 6
