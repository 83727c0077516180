"""Trackers that fail, hang or are killed: the run does not notice, and a chart has each step once."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from run_tools import Crash, assert_same_outcome, crash_at, make_spec, metrics, run_and_record

from llamatune.errors import EnvironmentFault, NumericsError
from llamatune.events import Event, Notice, RunStarted
from llamatune.spec import RunSpec, load_spec
from llamatune.tracking import tensorboard, trackers
from llamatune.tracking.trackers import Trackers, scalars
from llamatune.training.train import train

SpecWith = Callable[..., RunSpec]
ENOUGH_S = 30


class Chart:
    """A tracker that a test looks into; ``charts`` are those that were opened."""

    charts: list[Chart]
    next_step = 0

    def __init__(self, run: Path) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []
        self.times: list[float] = []
        self.exit_code: int | None = None
        self.charts.append(self)

    def log(self, values: Mapping[str, float], step: int, time_s: float) -> None:
        self.points.append((step, dict(values)))
        self.times.append(time_s)

    def close(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], None]:
    """Let a class take TensorBoard's place; its package need not be there."""
    monkeypatch.setattr(Chart, "charts", [], raising=False)
    monkeypatch.setattr(trackers, "_require", lambda package: None)
    return lambda kind: monkeypatch.setattr(tensorboard, "TensorBoardTracker", kind)


@pytest.fixture
def spec_with(tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path) -> SpecWith:
    """Six steps, an evaluation after each third, a checkpoint after each second."""
    settings = {"training__num_epochs": 2, "training__save_every_steps": 2, "tracking": {"tensorboard": True}}
    data = prepared(validation_fraction=0.25, seed=3)
    return lambda name="run", **changes: make_spec(tiny_base(), data, tmp_path / name, **{**settings, **changes})


def _tracked(spec: RunSpec, observer: Callable[[Event], None] = lambda event: None) -> list[Event]:
    """The events of a run with its trackers, warnings of theirs included."""
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        observer(event)

    with Trackers(spec, on_event) as tracking:
        train(spec, on_event=tracking.on_event)
    return events


def _warnings(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Notice) and event.kind == "warning"]


def _expected(run: Path) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], scalars(line)) for line in metrics(run) if "step" in line]


def test_a_chart_has_the_lines_of_the_log_under_the_names_of_the_field(
    use: Callable[[type], None], spec_with: SpecWith, tmp_path: Path
) -> None:
    use(Chart)
    events = _tracked(spec_with())
    (chart,) = Chart.charts
    assert _warnings(events) == []
    assert chart.points == _expected(tmp_path / "run")
    assert [step for step, _ in chart.points] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    step, evaluation = metrics(tmp_path / "run", "step")[0], metrics(tmp_path / "run", "eval")[1]
    first, third = chart.points[1][1], chart.points[4][1]
    assert first == pytest.approx({
        "train/loss": step["loss"], "train/perplexity": 2.718281828459045 ** step["loss"],
        "train/learning_rate": step["learning_rate"], "train/grad_norm": step["grad_norm"],
        "train/tokens_per_second": step["tokens_per_second"],
    })  # fmt: skip
    assert third == {"eval/loss": evaluation["loss"], "eval/perplexity": evaluation["perplexity"]}
    assert chart.exit_code == 0


def test_killed_at_any_event_the_last_chart_is_whole(
    use: Callable[[type], None], spec_with: SpecWith, tmp_path: Path
) -> None:
    use(Chart)
    events = _tracked(spec_with("whole"))
    first = next(i for i, event in enumerate(events) if isinstance(event, RunStarted))
    for place in range(first, len(events), 3):
        spec = spec_with(f"killed-{place}")
        with pytest.raises(Crash):
            _tracked(spec, crash_at(place))
        _tracked(spec)
        assert Chart.charts[-1].points == _expected(Path(spec.training.output_dir)), place
        assert Chart.charts[-1].times == sorted(Chart.charts[-1].times)
        assert_same_outcome(Path(spec.training.output_dir), tmp_path / "whole")


def test_a_chart_that_holds_steps_is_not_told_of_them_again(
    use: Callable[[type], None], spec_with: SpecWith, tmp_path: Path
) -> None:
    class HoldsFour(Chart):
        next_step = 5

    use(HoldsFour)
    spec = spec_with()
    with pytest.raises(Crash):
        _tracked(spec, crash_at(9))
    _tracked(spec)
    assert [step for step, _ in HoldsFour.charts[-1].points] == [5, 6, 6]


def test_tracking_may_be_turned_on_off_and_renamed_between_two_starts(
    use: Callable[[type], None], spec_with: SpecWith, tmp_path: Path
) -> None:
    """Turned on late it has the early steps as well."""
    use(Chart)
    with pytest.raises(Crash):
        _tracked(spec_with(tracking={}), crash_at(9))
    assert not Chart.charts
    _tracked(spec_with(tracking={"tensorboard": True, "wandb_project": "other"}))
    assert Chart.charts[-1].points == _expected(tmp_path / "run")
    assert load_spec(tmp_path / "run" / "spec.yaml").tracking.wandb_project == "other"


def test_how_a_run_ended_is_told(use: Callable[[type], None], spec_with: SpecWith) -> None:
    use(Chart)
    with pytest.raises(NumericsError):
        _tracked(spec_with(training__learning_rate=1e30, training__optimizer="sgd", training__max_grad_norm=None))
    assert Chart.charts[-1].exit_code == 6


PLACES = ("start", "first line", "last line", "end")


def _misbehaving(place: str, misbehave: Callable[[], None]) -> type[Chart]:
    class Misbehaving(Chart):
        def __init__(self, run: Path) -> None:
            if place == "start":
                misbehave()
            super().__init__(run)

        def log(self, values: Mapping[str, float], step: int, time_s: float) -> None:
            if place == "first line" or (place == "last line" and step == 6):
                misbehave()

        def close(self, exit_code: int) -> None:
            if place == "end":
                misbehave()

    return Misbehaving


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), SystemExit(3)], ids=["error", "exit"])
@pytest.mark.parametrize("place", PLACES)
def test_a_tracker_that_fails_costs_one_warning(
    use: Callable[[type], None], spec_with: SpecWith, tmp_path: Path, place: str, fault: BaseException
) -> None:
    def misbehave() -> None:
        raise fault

    use(_misbehaving(place, misbehave))
    (warning,) = _warnings(_tracked(spec_with()))
    assert warning.startswith(f"no longer tracking with TensorBoard: {type(fault).__name__}: ")
    assert str(fault) in warning
    assert metrics(tmp_path / "run", "step")[-1]["step"] == 6
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Something that does not return while a test runs."""
    monkeypatch.setattr(trackers, "_CLOSING_S", 0.2)
    release = threading.Event()
    yield lambda: release.wait(ENOUGH_S) and None
    release.set()


@pytest.mark.parametrize("place", PLACES)
def test_a_tracker_that_hangs_costs_one_warning(
    use: Callable[[type], None], spec_with: SpecWith, never: Callable[[], None], place: str
) -> None:
    use(_misbehaving(place, never))
    began = time.monotonic()
    (warning,) = _warnings(_tracked(spec_with()))
    assert warning == "no longer tracking with TensorBoard: it did not end within 0.2 s"
    assert time.monotonic() - began < ENOUGH_S, "the run waited for it"


def test_a_tracker_that_falls_behind_is_given_up(
    use: Callable[[type], None], spec_with: SpecWith, never: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_BACKLOG", 3)
    use(_misbehaving("first line", never))
    events = _tracked(spec_with())
    assert _warnings(events) == ["no longer tracking with TensorBoard: it is 3 lines behind"]


def test_a_warning_keeps_the_key_to_itself(
    use: Callable[[type], None], spec_with: SpecWith, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "5ec2e7" * 6 + "abcd"
    monkeypatch.setenv("WANDB_API_KEY", key)

    def misbehave() -> None:
        raise ValueError(f"the key {key}\nis refused")

    use(_misbehaving("start", misbehave))
    assert _warnings(_tracked(spec_with())) == [
        "no longer tracking with TensorBoard: ValueError: the key *** is refused"
    ]


@pytest.mark.parametrize(("package", "value"), [("tensorboard", True), ("wandb", "offline"), ("wandb", "online")])
def test_a_package_that_is_not_there_is_refused_before_anything_begins(
    spec_with: SpecWith, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, value: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvironmentFault) as raised:
        Trackers(spec_with(tracking={package: value}), lambda event: None)
    assert raised.value.exit_code == 5
    assert f"tracking.{package}: pip install {package}, or" in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_opens_no_tracker(use: Callable[[type], None], spec_with: SpecWith) -> None:
    use(Chart)
    run_and_record(spec_with())
    _tracked(spec_with())
    assert not Chart.charts
