"""The validation loss before the first step: once, beside the training and without a trace in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_tools import Crash, StopAfter, assert_same_outcome, make_spec, metrics, outcome, run_and_record

from llamatune.errors import Stopped
from llamatune.events import EvalDone, Event, Progress, RunStarted, StepDone
from llamatune.formats.metrics import read_metrics
from llamatune.reporting.report_data import report_run
from llamatune.reporting.run_reader import read_run
from llamatune.spec import RunSpec
from llamatune.training import profiling
from llamatune.training.train import train

SpecWith = Callable[..., RunSpec]
OFTEN: dict[str, Any] = {
    "training__max_steps": 5, "training__save_every_steps": 2, "evaluation__every_steps": 2,
    "evaluation__early_stopping_patience": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def spec_with(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> SpecWith:
    """18 rows in windows of 6 make an epoch of 3 steps; 5 rows are held out."""
    data, runs = prepared(validation_fraction=0.25, seed=3), tmp_path_factory.mktemp("runs")
    return lambda name, **changes: make_spec(tiny_base(), data, runs / name, **{**OFTEN, **changes})


@pytest.fixture(scope="module")
def whole(spec_with: SpecWith) -> Path:
    """The run that nothing disturbed."""
    return Path(train(spec_with("whole"))["output_dir"])


@pytest.fixture(scope="module")
def without(spec_with: SpecWith) -> Path:
    """The same run without the loss before training."""
    summary, events = run_and_record(spec_with("without", evaluation__at_start=False))
    assert summary["start_eval_loss"] is None
    assert not [event for event in events if isinstance(event, RunStarted) and event.evaluates_first]
    return Path(summary["output_dir"])


def _at_start(run: Path) -> list[int]:
    return [place for place, line in enumerate(metrics(run)) if line["event"] == "eval" and line["step"] == 0]


def test_nothing_but_a_line_of_the_log_differs_from_a_run_without_it(whole: Path, without: Path) -> None:
    found = outcome(whole)
    first, *found["metrics"] = found["metrics"]
    assert (first["event"], first["step"], first["best"]) == ("eval", 0, False)
    assert found == outcome(without)
    states = [max((run / "checkpoints").iterdir()) / "state.json" for run in (whole, without)]
    positions = [json.loads(state.read_text())["position"] for state in states]
    for name in ("best_eval_loss", "best_step", "patience_loss", "evaluations_without_improvement", "evaluated_step"):
        assert positions[0][name] == positions[1][name]


def test_a_run_that_goes_on_does_not_repeat_it(spec_with: SpecWith, whole: Path) -> None:
    spec, stop, told = spec_with("parts"), StopAfter(2), list[Event]()
    with pytest.raises(Stopped):
        train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    train(spec, on_event=told.append)
    assert not [event for event in told if isinstance(event, EvalDone) and not event.step]
    assert_same_outcome(Path(spec.training.output_dir), whole)


def test_a_run_that_died_before_its_first_checkpoint_has_it_once(spec_with: SpecWith, whole: Path) -> None:
    spec = spec_with("killed")

    def die_at_a_step(event: Event) -> None:
        if isinstance(event, StepDone):
            raise Crash

    with pytest.raises(Crash):
        train(spec, on_event=die_at_a_step)
    assert _at_start(Path(spec.training.output_dir)) == [0]
    train(spec)
    assert _at_start(Path(spec.training.output_dir)) == [0]
    assert_same_outcome(Path(spec.training.output_dir), whole)


def test_a_stop_while_it_is_computed_leaves_nothing_half_done(spec_with: SpecWith, whole: Path) -> None:
    spec, batches = spec_with("stopped"), list[Event]()
    with pytest.raises(Stopped, match="after step 0 of 5"):
        train(
            spec,
            on_event=lambda event: batches.append(event) if isinstance(event, Progress) else None,
            should_stop=lambda: any(isinstance(event, Progress) and event.task == "evaluating" for event in batches),
        )
    assert not metrics(Path(spec.training.output_dir))
    train(spec)
    assert_same_outcome(Path(spec.training.output_dir), whole)


@pytest.mark.parametrize("now", [True, False])
def test_an_old_run_goes_on_without_it(spec_with: SpecWith, without: Path, now: bool) -> None:
    """Its spec does not know the field, which may have either value now."""
    old, run = spec_with(f"old {now}", evaluation__at_start=False), StopAfter(2)
    with pytest.raises(Stopped):
        train(old, on_event=run.on_event, should_stop=run.should_stop)
    file = Path(old.training.output_dir) / "spec.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(keepends=True) if "at_start" not in line))
    summary = train(spec_with(f"old {now}", evaluation__at_start=now))
    assert summary["start_eval_loss"] is None
    assert_same_outcome(Path(summary["output_dir"]), without)


def test_before_and_after_stand_side_by_side(spec_with: SpecWith) -> None:
    """Training that makes it worse: what was before is neither the best nor the lowest of the report."""
    worse = {"training__learning_rate": 1.0, "evaluation__early_stopping_patience": 2, "evaluation__every_steps": 1}
    summary = train(spec_with("worse", lora=None, **worse))
    run = Path(summary["output_dir"])
    start, *evaluations = metrics(run, "eval")
    lowest = min(line["loss"] for line in evaluations)
    assert summary["start_eval_loss"] == start["loss"] < summary["best_eval_loss"] == lowest
    assert json.loads((run / "best" / "evaluation.json").read_text())["step"] == summary["best_step"] > 0
    report = report_run(read_run(run, "worse"), [], 0.0)
    assert report.figures["start_validation_loss"] == start["loss"]
    assert report.figures["best_validation_loss"] == lowest
    assert [line["step"] for line in report.evaluations] == [0, *(line["step"] for line in evaluations)]
    logged = read_metrics(run / "metrics.jsonl")
    assert logged.at_start is not None
    assert [line.step for line in logged.evaluations] == [line["step"] for line in evaluations]


def test_its_time_is_part_of_the_first_epochs_seconds_of_validation(whole: Path) -> None:
    (first, *_), lines = json.loads((whole / "summary.json").read_text())["epochs"], metrics(whole)
    seconds = [line["seconds"] for line in lines if line["event"] == "eval" and line["step"] <= 3]
    assert len(seconds) == 2
    assert first["evaluation_s"] == pytest.approx(sum(seconds))
    assert next(line for line in lines if line["event"] == "step")["elapsed_s"] > seconds[0]
    assert first["epoch_s"] > sum(seconds)


def test_without_validation_rows_there_is_none(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    summary, events = run_and_record(make_spec(tiny_base(), prepared(), tmp_path / "run", training__max_steps=1))
    assert summary["start_eval_loss"] is None
    assert not [event for event in events if isinstance(event, EvalDone)]


@pytest.mark.parametrize(("first", "begins_at"), [(True, 2), (False, 0)])
def test_a_profilers_trace_begins_behind_it(
    first: bool, begins_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    import torch

    began: list[tuple[int, str]] = []
    told: list[Event] = []

    @contextmanager
    def traced(trace: Path, *rest: object) -> Any:
        began.append((len(told) - 1, trace.name))
        yield

    monkeypatch.setattr(profiling, "_traced", traced)
    started = RunStarted(1, 1, 1, 1, 9, 3, 0, "cpu", evaluates_first=first)
    with profiling.profiled(2, torch.device("cpu"), tmp_path, told.append) as observe:
        for event in (started, Progress("evaluating", 1, 1), EvalDone(0 if first else 3, 1.0)):
            observe(event)
    assert began == [(begins_at, "trace-from-step-000001.json")]
