"""``learning_rate: auto`` and null: the run that follows is that of the number, bit for bit, whatever stops it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_tools import Crash, StopAfter, assert_same_outcome, files, make_spec, metrics

from llamatune.errors import NumericsError, SpecError, Stopped
from llamatune.events import Event, Notice, Progress, StepDone, ignore_event, never_stop
from llamatune.formats.metrics import read_metrics
from llamatune.inference.evaluate import RowScore
from llamatune.ranks import ALONE
from llamatune.reporting.run_reader import read_run
from llamatune.slurm_job_end import Clock
from llamatune.spec import RunSpec
from llamatune.training import rate_search
from llamatune.training.inputs import open_inputs
from llamatune.training.model_and_optimizer import build_learner
from llamatune.training.passes import PassRule
from llamatune.training.rate_choice import BUDGET
from llamatune.training.rate_search import search_learning_rate
from llamatune.training.run_directory import RunDirectory
from llamatune.training.schedule import Schedule
from llamatune.training.train import plan_training, train

SpecAt = Callable[..., RunSpec]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora, cosine, warm-up": {
        "lora": {"kind": "dora", "r": 4, "dropout": 0.1, "target_modules": "all-linear"},
        "training__lr_scheduler": "cosine", "training__warmup_steps": 2, "training__min_learning_rate": 1e-5,
    },
    "every parameter": {"lora": None},
    "fp16": {"training__precision": "fp16"},
}  # fmt: skip


@pytest.fixture
def spec_at(small_base: Path, prepared: Callable[..., Path], tmp_path: Path) -> SpecAt:
    """A run of four steps in a directory of that name, with changes."""

    def make(name: str, rate: float | str | None = "auto", **changes: Any) -> RunSpec:
        return make_spec(small_base, prepared(), tmp_path / name, training__learning_rate=rate, **changes)

    return make


def found(run: Path) -> dict[str, Any]:
    """The search, which ``origin.json`` and the first line of the log tell alike."""
    recorded: dict[str, Any] = json.loads((run / "origin.json").read_text())["learning_rate_search"]
    line = metrics(run)[0]
    assert line == {"event": "learning_rate_search", **recorded}
    return recorded


def stop_in_search(after: int) -> tuple[Callable[[Event], None], Callable[[], bool]]:
    """Asks for a stop once so many micro-batches of the search are done."""
    seen: list[int] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Progress) and event.task == "finding the learning rate":
            seen.append(event.done)

    return on_event, lambda: len(seen) >= after


# The choice, and what follows it


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_is_the_one_whose_spec_has_the_found_number(spec_at: SpecAt, tmp_path: Path, kind: str) -> None:
    """The adapter, the optimizer, the losses and the model card, bit for bit; only the search is told beside them."""
    summary = train(spec_at("auto", **KINDS[kind]))
    search = found(tmp_path / "auto")
    rate = search["learning_rate"]
    assert summary["learning_rate"] == rate
    assert search["micro_batches"] <= BUDGET
    assert len(search["rates"]) == len(search["losses"]) >= 3
    best = min((loss, tried) for loss, tried in zip(search["losses"], search["rates"], strict=True) if loss is not None)
    assert best[0] < search["start_loss"]

    train(spec_at("number", rate, **KINDS[kind]))
    lines = (tmp_path / "auto" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "auto" / "metrics.jsonl").write_text("".join(lines[1:]))
    assert_same_outcome(tmp_path / "auto", tmp_path / "number")


def test_the_search_leaves_the_generators_as_they_were(spec_at: SpecAt, tmp_path: Path) -> None:
    spec = spec_at("none")
    inputs = open_inputs(spec, False, ignore_event)
    learner = build_learner(spec, inputs, ignore_event, never_stop)
    weights = {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}
    before, schedule = torch.get_rng_state(), Schedule(spec, inputs.prepared.train)
    run = RunDirectory(tmp_path, None, frozenset(), PassRule())
    search_learning_rate(spec, inputs, schedule, learner, run, ignore_event, never_stop, ALONE)
    assert torch.equal(torch.get_rng_state(), before)
    assert not learner.optimizer.state
    assert all(parameter.grad is None for parameter in learner.parameters.values())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in learner.parameters.items())


def test_the_rate_is_not_below_the_lowest_of_the_schedule(
    spec_at: SpecAt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All trials are far below it."""
    monkeypatch.setattr(rate_search, "prior_rate", lambda hidden_size, lora: 1e-9)
    train(spec_at("run", training__min_learning_rate=0.01, training__lr_scheduler="linear"))
    assert max(found(tmp_path / "run")["rates"]) < 1e-4
    assert found(tmp_path / "run")["learning_rate"] == 0.01


def test_rates_that_diverge_are_not_chosen(spec_at: SpecAt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights become infinite above a rate: those trials have no loss, and the run is finite."""
    monkeypatch.setattr(rate_search, "prior_rate", lambda hidden_size, lora: 1e38)
    monkeypatch.setattr(rate_search, "run_factor", lambda *sizes: 1.0)
    with pytest.raises(NumericsError, match=r"lower training\.learning_rate"):
        train(spec_at("run"))
    search = json.loads((tmp_path / "run" / "origin.json").read_text())["learning_rate_search"]
    assert None in search["losses"]
    finite = [rate for rate, loss in zip(search["rates"], search["losses"], strict=True) if loss is not None]
    assert search["learning_rate"] <= max(finite, default=math.inf)


@pytest.mark.parametrize(
    ("loss", "told"),
    [(None, "every trial diverged"), (99.0, r"no trial came below the untrained loss \d"), (0.1, None)],
)
def test_trials_that_speak_for_no_rate_are_told_of(
    spec_at: SpecAt, monkeypatch: pytest.MonkeyPatch, loss: float | None, told: str | None
) -> None:
    def trial(trials: Any, rate: float) -> float | None:
        trials.losses[rate] = loss
        return loss

    monkeypatch.setattr(rate_search._Trials, "loss_after", trial)
    events = list[Event]()
    train(spec_at("run", training__max_steps=1), on_event=events.append)
    warnings = [event.message for event in events if isinstance(event, Notice) and event.kind == "warning"]
    found = [line for line in warnings if line.startswith("learning rate: ")]
    assert len(found) == (told is not None)
    assert told is None or re.search(told, found[0])


def test_a_broken_base_is_told_as_training_tells_it(spec_at: SpecAt, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is not finite before any update is no matter of the rate."""
    monkeypatch.setattr(rate_search, "score_batch", lambda model, batch: [RowScore(1, 3, 3, math.nan, 0)])
    with pytest.raises(
        NumericsError, match=r"the loss is not finite at step 1, among rows \d.*see whether the weights"
    ):
        train(spec_at("run"))


# Interruptions


def test_a_stopped_search_starts_over_and_finds_the_same(spec_at: SpecAt, tmp_path: Path) -> None:
    train(spec_at("whole"))
    spec = spec_at("stopped")
    on_event, should_stop = stop_in_search(after=20)
    with pytest.raises(Stopped, match=r"^stopped by a signal after a part of the search"):
        train(spec, on_event=on_event, should_stop=should_stop)
    assert "learning_rate_search" not in json.loads((tmp_path / "stopped" / "origin.json").read_text())
    train(spec)
    assert found(tmp_path / "stopped") == found(tmp_path / "whole")
    assert_same_outcome(tmp_path / "stopped", tmp_path / "whole")


def test_a_search_that_takes_all_the_time_is_stopped_in_time(spec_at: SpecAt, tmp_path: Path) -> None:
    """Ten seconds a micro-batch, of a minute less its margin of six seconds."""
    now = 0.0

    def on_event(event: Event) -> None:
        nonlocal now
        now += 10.0 if isinstance(event, Progress) and event.task == "finding the learning rate" else 0.0

    with pytest.raises(Stopped, match=r"^stopped 0 s before training\.max_time after a part of .* with more time"):
        train(spec_at("run", training__max_time="1m"), on_event=on_event, clock=Clock(lambda: now, lambda: now))
    assert now == 60.0
    assert "learning_rate_search" not in json.loads((tmp_path / "run" / "origin.json").read_text())


def test_a_run_killed_before_its_first_checkpoint_searches_again(spec_at: SpecAt, tmp_path: Path) -> None:
    train(spec_at("whole"))
    spec = spec_at("killed")

    def die(event: Event) -> None:
        if isinstance(event, StepDone):
            raise Crash

    with pytest.raises(Crash):
        train(spec, on_event=die)
    train(spec)
    assert_same_outcome(tmp_path / "killed", tmp_path / "whole")


def test_a_resumed_run_does_not_search(spec_at: SpecAt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(spec_at("whole"))
    spec, stop = spec_at("stopped"), StopAfter(2)
    with pytest.raises(Stopped):
        train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    monkeypatch.delattr(rate_search._Trials, "start")
    train(spec)
    assert found(tmp_path / "stopped") == found(tmp_path / "whole")
    assert_same_outcome(tmp_path / "stopped", tmp_path / "whole")
    before = files(tmp_path / "stopped")
    train(spec)
    train(spec_at("stopped", found(tmp_path / "whole")["learning_rate"]))
    assert files(tmp_path / "stopped") == before


def test_auto_does_not_take_over_a_run_that_began_with_a_number(spec_at: SpecAt) -> None:
    stop = StopAfter(2)
    with pytest.raises(Stopped):
        train(spec_at("run", 1e-3), on_event=stop.on_event, should_stop=stop.should_stop)
    with pytest.raises(SpecError, match=r"training\.learning_rate: 0\.001 -> auto"):
        train(spec_at("run"))
    with pytest.raises(SpecError, match="auto is for the beginning of a run"):
        train(spec_at("run"), allowed_changes=("training.learning_rate",))


def test_any_number_of_ranks_finds_the_rate_of_one(trained: Callable[..., Path], alone: Callable[..., Path]) -> None:
    changes = {"training__learning_rate": "auto", "training__max_steps": 6}
    expected, run = alone(changes), trained(2, changes)
    assert found(run) == found(expected)
    assert_same_outcome(run, expected)


def test_ranks_that_share_every_parameter_find_it_too(trained: Callable[..., Path], alone: Callable[..., Path]) -> None:
    """Their sums have another order, so the losses are not the same bytes."""
    changes = {"training__learning_rate": "auto", "training__max_steps": 2, "lora": None}
    expected, run = found(alone(changes)), found(trained(2, changes))
    assert run["learning_rate"] == pytest.approx(expected["learning_rate"], rel=1e-2)
    assert run["losses"] == pytest.approx(expected["losses"], rel=1e-4)


# The default


@pytest.mark.parametrize(("lora", "rate"), [({"r": 4}, 3e-4), (None, 2e-5)])
def test_null_is_the_usual_rate_and_is_written_out(spec_at: SpecAt, tmp_path: Path, lora: Any, rate: float) -> None:
    summary = train(spec_at("run", None, lora=lora, training__max_steps=1))
    assert summary["learning_rate"] == metrics(tmp_path / "run", "step")[0]["learning_rate"] == rate
    assert yaml.safe_load((tmp_path / "run" / "spec.yaml").read_text())["training"]["learning_rate"] == rate


def test_a_run_of_another_default_goes_on_with_its_rate(spec_at: SpecAt, tmp_path: Path) -> None:
    """Its spec relied on the default of its version, 1e-5, which its ``spec.yaml`` has."""
    train(spec_at("whole", 1e-5))
    stop = StopAfter(2)
    with pytest.raises(Stopped):
        train(spec_at("run", 1e-5), on_event=stop.on_event, should_stop=stop.should_stop)
    train(spec_at("run", None))
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")
    train(spec_at("run", None), overwrite=True)
    assert metrics(tmp_path / "run", "step")[0]["learning_rate"] == 3e-4


def test_a_lowest_rate_above_the_default_is_refused(spec_at: SpecAt) -> None:
    with pytest.raises(SpecError, match=r"min_learning_rate 0\.1 is above learning_rate 0\.0003, the default"):
        spec_at("run", None, training__min_learning_rate=0.1)


# What is told


def test_plan_and_report_tell_of_the_rate(spec_at: SpecAt, tmp_path: Path) -> None:
    assert plan_training(spec_at("run"))["learning_rate"].startswith("auto: searched before the first step")
    assert plan_training(spec_at("run", None))["learning_rate"] == 3e-4
    events: list[Event] = []
    train(spec_at("run"), on_event=events.append)
    rate = found(tmp_path / "run")["learning_rate"]
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert any(f"learning rate {rate:.3g}, found by trials" in notice for notice in notices)
    done = [event.done for event in events if isinstance(event, Progress) and event.task == "finding the learning rate"]
    assert done == list(range(1, found(tmp_path / "run")["micro_batches"] + 1))
    assert read_run(tmp_path / "run", "run").spec.training.learning_rate == rate
    logged = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert logged.rate_search is not None
    assert logged.rate_search.learning_rate == rate
