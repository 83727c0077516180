"""Learning rate as a function of the step, in closed form, and where a run ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_run import schedule_value
from run_tools import make_spec, metrics

from llamatune.errors import SpecError
from llamatune.spec_sections import TrainingSection
from llamatune.training.schedule import learning_rate_at
from llamatune.training.train import train


def _section(**values: object) -> TrainingSection:
    return TrainingSection.model_validate({"output_dir": "x", **values})


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(1, 50).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total))),
    st.floats(0.0, 1.0),
)
def test_the_rate_follows_its_closed_form(kind: str, lengths: tuple[int, int], floor: float) -> None:
    total, warmup = lengths
    section = _section(learning_rate=1.0, min_learning_rate=floor, lr_scheduler=kind, warmup_steps=warmup)
    found = [learning_rate_at(section, step, total) for step in range(total)]
    assert found == pytest.approx([schedule_value(kind, 1.0, floor, warmup, total, n + 1) for n in range(total)])
    assert all(0 < rate <= 1 for rate in found)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"lr_scheduler": "constant"}, [8, 8, 8, 8, 8, 8, 8, 8]),
        ({"lr_scheduler": "linear"}, [8, 7, 6, 5, 4, 3, 2, 1]),
        ({"lr_scheduler": "linear", "min_learning_rate": 4.0}, [8, 7.5, 7, 6.5, 6, 5.5, 5, 4.5]),
        ({"lr_scheduler": "constant", "warmup_steps": 4}, [2, 4, 6, 8, 8, 8, 8, 8]),
        ({"lr_scheduler": "constant", "warmup_ratio": 0.2}, [4, 8, 8, 8, 8, 8, 8, 8]),
        ({"lr_scheduler": "linear", "warmup_steps": 4}, [2, 4, 6, 8, 8, 6, 4, 2]),
        ({"lr_scheduler": "cosine", "warmup_steps": 4, "min_learning_rate": 2.0},
         [2, 4, 6, 8, 8, 2 + 3 * (1 + 2**-0.5), 5, 2 + 3 * (1 - 2**-0.5)]),
    ],
)  # fmt: skip
def test_rates_of_eight_steps_by_hand(values: dict[str, object], expected: list[float]) -> None:
    section = _section(learning_rate=8.0, **values)
    assert [learning_rate_at(section, step, 8) for step in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"training__max_steps": 5, "training__warmup_steps": 6},
        {"training__num_epochs": 2, "training__warmup_steps": 9},
    ],
)
def test_a_warm_up_longer_than_the_run_is_a_spec_error(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, changes: dict[str, int]
) -> None:
    """23 rows in windows of 6 are 4 steps an epoch."""
    with pytest.raises(SpecError, match="longer than the run"):
        train(make_spec(tiny_base(), prepared(), tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"training__num_epochs": 2}, 8),
        ({"training__max_steps": 5}, 5),
        ({"training__max_steps": 5, "training__warmup_steps": 5}, 5),
        ({"training__num_epochs": 2, "training__gradient_accumulation_steps": 1000}, 2),
    ],
)
def test_a_run_makes_the_updates_it_says(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path, changes: dict[str, int], steps: int
) -> None:
    """The last one: a window larger than the data is one partial window."""
    assert train(make_spec(tiny_base(), prepared(), tmp_path / "run", **changes))["steps"] == steps
    assert len(metrics(tmp_path / "run", "step")) == steps


@pytest.mark.parametrize(
    "changes",
    [
        {"training__num_epochs": 1, "training__max_steps": 1},
        {"training__warmup_steps": 2, "training__warmup_ratio": 0.1},
        {"training__min_learning_rate": 0.5},
        {"training__nesterov": True},
    ],
)
def test_values_that_contradict_each_other_are_spec_errors(changes: dict[str, object]) -> None:
    from run_tools import spec_values

    from llamatune.spec import build_spec

    values = spec_values(Path("base"), Path("data"), Path("run"))
    values["training"].update({name.partition("__")[2]: value for name, value in changes.items()})
    with pytest.raises(SpecError) as raised:
        build_spec(values, "test")
    assert raised.value.exit_code == 2
