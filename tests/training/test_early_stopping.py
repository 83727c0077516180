"""When a run stops for want of a lower loss, what ``best/`` says of itself, and what is kept of each epoch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_run import collate, kept_rows, summed_cross_entropy
from run_tools import (
    Crash,
    StopAfter,
    assert_same_outcome,
    crash_at,
    keep_epochs_in_state,
    last_checkpoint,
    make_spec,
    metrics,
    rewrite,
    run_and_record,
)

from llamatune.checkpoints.training_checkpoint import read_run_state
from llamatune.errors import CheckpointError, SpecError, Stopped
from llamatune.events import CheckpointSaved, EpochDone, EvalDone, Notice
from llamatune.reporting.run_reader import read_run
from llamatune.spec import RunSpec
from llamatune.training.early_stopping import out_of_patience
from llamatune.training.train import train
from llamatune.training.trainer_state import TrainerState

SpecWith = Callable[..., RunSpec]


@pytest.fixture
def spec_with(tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path) -> SpecWith:
    """18 rows in windows of 6 make an epoch of 3 steps; 5 rows are held out."""
    data = prepared(validation_fraction=0.25, seed=3)
    return lambda name="run", **changes: make_spec(tiny_base(), data, tmp_path / name, **changes)


def _evaluations_until_the_stop(spec: RunSpec, losses: list[float]) -> tuple[int | None, TrainerState]:
    progress = TrainerState()
    evaluation = spec.evaluation
    for count, loss in enumerate(losses, 1):
        progress.step = count
        lowest = progress.best_eval_loss is None or loss < progress.best_eval_loss
        done = EvalDone(count, loss, math.exp(loss), lowest)
        progress.note_evaluation(done, evaluation.early_stopping_min_delta)
        if out_of_patience(progress.evaluations_without_improvement, evaluation.early_stopping_patience):
            return count, progress
    return None, progress


@pytest.mark.parametrize(
    ("losses", "min_delta", "stop"),
    [
        ([3.0, 2.0, 2.1, 2.2], 0.0, 4),
        ([3.0, 2.0, 2.0, 2.0], 0.0, 4),
        ([3.0, 2.0, 2.1, 1.9, 2.0], 0.0, None),
        ([3.0, 2.75, 2.5, 2.25, 2.0], 0.25, None),  # lower by just as much is not lower by more; every other one is
        ([3.0, 2.9, 2.8, 2.7], 0.5, 3),
        ([3.0, 2.7, 2.4, 2.3, 1.8], 0.5, None),  # small gains that add up
    ],
)
def test_patience_of_two_by_hand(spec_with: SpecWith, losses: list[float], min_delta: float, stop: int | None) -> None:
    changes = {"evaluation__early_stopping_min_delta": min_delta} if min_delta else {}
    spec = spec_with(evaluation__early_stopping_patience=2, **changes)
    assert _evaluations_until_the_stop(spec, losses)[0] == stop


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(0, 5), st.integers(1, 4))
def test_the_stop_comes_where_a_search_over_all_evaluations_finds_it(
    eighths: list[int], delta: int, patience: int
) -> None:
    """Eighths are exact, so the border itself is met. The best is the lowest, whatever min_delta is."""
    evaluation = {"early_stopping_patience": patience, "early_stopping_min_delta": delta / 8}
    spec = make_spec(Path("base"), Path("data"), Path("run"), evaluation=evaluation)
    satisfied = [0]
    for place, loss in enumerate(eighths):
        if eighths[satisfied[-1]] - loss > delta:
            satisfied.append(place)
    gaps = zip(satisfied, [*satisfied[1:], len(eighths)], strict=True)
    expected = next((place + patience + 1 for place, following in gaps if following - place > patience), None)
    stop, progress = _evaluations_until_the_stop(spec, [eighth / 8 for eighth in eighths])
    assert stop == expected
    seen = eighths[:stop]
    assert (progress.best_eval_loss, progress.best_step) == (min(seen) / 8, seen.index(min(seen)) + 1)


def test_a_run_without_enough_progress_stops_and_its_best_is_still_the_lowest(spec_with: SpecWith) -> None:
    often = {"training__num_epochs": 9, "evaluation__every_steps": 1, "evaluation__early_stopping_patience": 3}
    eager = train(spec_with("eager", **often, evaluation__early_stopping_min_delta=100.0))
    calm = train(spec_with("calm", **often))
    assert (eager["steps"], eager["stopped_early"]) == (4, True)
    assert calm["steps"] > 4
    evaluations = metrics(Path(eager["output_dir"]), "eval")[1:]  # the first is that before training
    best = min(evaluations, key=lambda line: line["loss"])
    assert best["step"] > 1, "or the lowest and what patience watches are the same"
    assert (eager["best_step"], eager["best_eval_loss"]) == (best["step"], best["loss"])


def test_a_least_difference_without_patience_is_a_spec_error() -> None:
    with pytest.raises(SpecError, match="early_stopping_min_delta needs early_stopping_patience"):
        make_spec(Path("b"), Path("d"), Path("r"), evaluation={"early_stopping_min_delta": 0.1})


def test_the_best_adapter_says_what_peft_measures_of_it(
    spec_with: SpecWith, tiny_base: Callable[..., Path], prepared: Callable[..., Path]
) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    summary = train(spec_with(training__num_epochs=2))
    best = Path(summary["output_dir"]) / "best"
    evaluation = json.loads((best / "evaluation.json").read_text())
    rows = kept_rows(prepared(validation_fraction=0.25, seed=3), "validation")
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_base(), dtype=torch.float32), best).eval()
    with torch.no_grad():
        total = summed_cross_entropy(model, collate(rows)).item()
    targets = sum(label != -100 for _, labels in rows for label in labels[1:])
    assert (evaluation["rows"], evaluation["target_tokens"]) == (len(rows), targets)
    assert evaluation["loss"] == pytest.approx(total / targets, rel=1e-5)
    assert evaluation["perplexity"] == pytest.approx(math.exp(total / targets), rel=1e-4)
    assert (evaluation["step"], evaluation["epoch"]) == (summary["best_step"], summary["best_step"] / 3)


def test_the_best_whole_model_says_how_good_it_is(spec_with: SpecWith) -> None:
    summary = train(spec_with(lora=None, training__max_steps=2, training__learning_rate=1e-3))
    run = Path(summary["output_dir"])
    evaluation = json.loads((run / "best" / "evaluation.json").read_text())
    assert evaluation["loss"] == summary["best_eval_loss"]
    assert not (run / "model" / "evaluation.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"training__num_epochs": 3},
        {"training__max_steps": 8, "evaluation__every_steps": 2, "training__save_every_steps": 2},
        {"training__max_steps": 4, "evaluation__every_steps": 4},
    ],
)
def test_an_epoch_is_kept_as_its_lines_add_up(spec_with: SpecWith, changes: dict[str, Any]) -> None:
    summary, events = run_and_record(spec_with(**changes))
    run = Path(summary["output_dir"])
    steps, evaluations = metrics(run, "step"), metrics(run, "eval")
    saves = [event for event in events if isinstance(event, CheckpointSaved)]
    assert [epoch["epoch"] for epoch in summary["epochs"]] == list(range(1, -(-len(steps) // 3) + 1))
    for epoch in summary["epochs"]:
        inside = range(3 * epoch["epoch"] - 2, 3 * epoch["epoch"] + 1)
        lines = [line for line in steps if line["step"] in inside]
        held_out = [line for line in evaluations if line["step"] in inside]
        timed = held_out if epoch["epoch"] > 1 else [evaluations[0], *held_out]  # with that before training
        tokens = sum(line["target_tokens"] for line in lines)
        mean = sum(line["loss"] * line["target_tokens"] for line in lines) / tokens
        assert epoch["target_tokens"] == tokens
        assert epoch["train_loss"] == pytest.approx(mean)
        assert epoch["train_perplexity"] == pytest.approx(math.exp(mean))
        last = held_out[-1] if held_out else {"loss": None, "perplexity": None}
        assert (epoch["validation_loss"], epoch["validation_perplexity"]) == (last["loss"], last["perplexity"])
        assert epoch["evaluation_s"] == pytest.approx(sum(line["seconds"] for line in timed))
        assert epoch["checkpoint_s"] == pytest.approx(sum(event.seconds for event in saves if event.step in inside))
        assert epoch["epoch_s"] > epoch["evaluation_s"] + epoch["checkpoint_s"]
        slowest, fastest = (pick(line["tokens_per_second"] for line in lines) for pick in (min, max))
        assert slowest <= epoch["tokens_per_second"] <= fastest
    assert sum(epoch["epoch_s"] for epoch in summary["epochs"]) <= summary["runtime_s"]
    told = [event for event in events if isinstance(event, EpochDone)]
    assert [(e.epoch, e.validation_loss, e.epoch_s) for e in told] == [
        (e["epoch"], e["validation_loss"], e["epoch_s"]) for e in summary["epochs"]
    ]


def _stop(spec: RunSpec, count: int) -> Path:
    stop = StopAfter(count)
    with pytest.raises(Stopped):
        train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    return last_checkpoint(Path(spec.training.output_dir))


def _as_the_first_schema_had_it(state: dict[str, Any]) -> None:
    position = state["position"]
    epoch = position.pop("open_epoch")
    position["epoch_loss"], position["epoch_target_tokens"] = epoch["loss"], epoch["target_tokens"]
    del position["patience_loss"]
    known = ("epoch", "train_loss", "train_perplexity", "target_tokens")
    position["epochs"] = [{key: closed[key] for key in known} for closed in position["epochs"]]


def test_a_checkpoint_from_before_these_fields_is_continued(spec_with: SpecWith) -> None:
    """Stopped inside the second epoch: of the first nothing but its losses was kept then."""
    longer = {"training__num_epochs": 3, "evaluation__every_steps": 2, "evaluation__early_stopping_patience": 9}
    whole, parts = spec_with("whole", **longer), spec_with("parts", **longer)
    summary = train(whole)
    checkpoint = _stop(parts, 5 + 2 * 2)  # each of two evaluations has two batches
    assert checkpoint.name == "step-000005"
    keep_epochs_in_state(checkpoint, schema=1)
    rewrite(checkpoint, _as_the_first_schema_had_it)
    continued = train(parts)
    first, *others = continued["epochs"]
    assert first["epoch_s"] is None
    assert first["validation_loss"] is None
    assert first["train_loss"] == summary["epochs"][0]["train_loss"]
    assert [epoch["validation_loss"] for epoch in others] == [
        epoch["validation_loss"] for epoch in summary["epochs"][1:]
    ]
    state = json.loads((last_checkpoint(Path(whole.training.output_dir)) / "state.json").read_text())["position"]
    ours = json.loads((last_checkpoint(Path(parts.training.output_dir)) / "state.json").read_text())["position"]
    for name in ("patience_loss", "best_eval_loss", "evaluations_without_improvement", "step", "window"):
        assert ours[name] == state[name], name


def test_a_position_that_is_none_is_refused(spec_with: SpecWith) -> None:
    spec = spec_with()
    checkpoint = _stop(spec, 2)
    rewrite(checkpoint, lambda state: state["position"].update(phase_of_the_moon=1))
    with pytest.raises(CheckpointError, match=r"has the unknown key position.phase_of_the_moon: .*state.json"):
        read_run_state(checkpoint)


def test_an_epoch_that_an_earlier_version_had_ended_is_not_gone_on_with(spec_with: SpecWith) -> None:
    spec = spec_with(training__max_steps=4)
    train(spec)
    checkpoint = last_checkpoint(Path(spec.training.output_dir))
    rewrite(checkpoint, lambda state: state["position"].update(closed_epochs=2))
    with pytest.raises(CheckpointError, match="ended the run inside an epoch"):
        train(spec_with(training__max_steps=5))


def test_an_epoch_in_which_a_run_ended_is_gone_on_with(spec_with: SpecWith) -> None:
    """Without evaluations, which come at a run's end too, a run that grew is the one that was planned so long."""
    train(spec_with("grown", training__max_steps=4, training__save_every_steps=4, evaluation__every_steps=4))
    train(spec_with("grown", training__max_steps=8, training__save_every_steps=4, evaluation__every_steps=4))
    planned = train(
        spec_with("planned", training__max_steps=8, training__save_every_steps=4, evaluation__every_steps=4)
    )
    run = Path(planned["output_dir"])
    assert_same_outcome(run.parent / "grown", run)


# A run that stopped early goes on when it may be more patient.

RESTLESS = {
    "training__num_epochs": 4, "training__learning_rate": 0.3, "training__save_every_steps": 2,
    "evaluation__every_steps": 1, "evaluation__early_stopping_patience": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({}, {"evaluation__early_stopping_patience": 3}),
        ({}, {"evaluation__early_stopping_patience": None}),
        (
            {"evaluation__early_stopping_min_delta": 0.05},
            {"evaluation__early_stopping_patience": None, "evaluation__early_stopping_min_delta": 0.0},
        ),
        (
            {"lora": {"r": 4, "alpha": 8, "dropout": 0.3}, "training__save_every_steps": 5},
            {"evaluation__early_stopping_patience": 4},
        ),
    ],
    ids=["raised", "null", "null, and no min_delta", "dropout"],
)
def test_with_more_patience_it_goes_on_as_if_it_had_had_it_from_the_start(
    spec_with: SpecWith, first: dict[str, Any], then: dict[str, Any]
) -> None:
    before, events = run_and_record(spec_with("parts", **{**RESTLESS, **first}))
    assert before["stopped_early"]
    stop = before["steps"]
    told = [event.message for event in events if isinstance(event, Notice) and "stopped early" in event.message]
    assert len(told) == 1
    assert re.match(rf"stopped early after step {stop} of 12: no lower validation loss in 1 evaluation\b", told[0])
    assert f"the lowest was {before['best_eval_loss']:.4f} at step {before['best_step']}, which is in best/" in told[0]
    assert "set evaluation.early_stopping_patience above 1, or to null" in told[0]
    run = Path(before["output_dir"])
    (logged,) = metrics(run, "early_stop")
    last = metrics(run, "eval")[-1]
    assert (logged["step"], logged["loss"]) == (last["step"], last["loss"]) == (stop, last["loss"])
    assert before["early_stop"] == {key: logged[key] for key in logged if key != "event"} | {"message": told[0]}
    assert told[0] in read_run(run, "run").notices
    patient = {**RESTLESS, **first, **then}
    again, events = run_and_record(spec_with("parts", **{**RESTLESS, **first}))
    assert again == before
    (again_told,) = [event.message for event in events if isinstance(event, Notice) and "nothing" in event.message]
    assert again_told == f"{run} stopped early: nothing to do ({told[0]})"
    parts = train(spec_with("parts", **patient))
    assert parts["steps"] > stop
    assert [line["step"] for line in metrics(run, "early_stop")] == [parts["steps"]] * parts["stopped_early"]
    whole = train(spec_with("whole", **patient))
    run, other = Path(whole["output_dir"]), Path(parts["output_dir"])
    assert_same_outcome(other, run)
    positions = [json.loads((last_checkpoint(path) / "state.json").read_text())["position"] for path in (run, other)]
    for name in ("patience_loss", "evaluations_without_improvement", "best_eval_loss", "best_step", "saved_step"):
        assert positions[0][name] == positions[1][name], name
    recorded = json.loads((other / "origin.json").read_text())["spec_changes"]
    assert {change["field"] for change in recorded} == {name.replace("__", ".") for name in then}


def test_killed_as_it_goes_on_it_goes_on_all_the_same(spec_with: SpecWith) -> None:
    """The changed min_delta is known from the run's record where the spec on the disk is the new one already."""
    first = {**RESTLESS, "evaluation__early_stopping_min_delta": 0.05}
    then = {**RESTLESS, "evaluation__early_stopping_patience": None}
    assert train(spec_with("parts", **first))["stopped_early"]
    with pytest.raises(Crash):
        train(spec_with("parts", **then), on_event=crash_at(0))
    parts, whole = train(spec_with("parts", **then)), train(spec_with("whole", **then))
    assert_same_outcome(Path(parts["output_dir"]), Path(whole["output_dir"]))


def test_less_patience_is_another_run(spec_with: SpecWith) -> None:
    train(spec_with(**{**RESTLESS, "evaluation__early_stopping_patience": 2}))
    for patience, least in ((1, 0.0), (2, 0.5), (3, 0.5)):
        changed = {"evaluation__early_stopping_patience": patience, "evaluation__early_stopping_min_delta": least}
        with pytest.raises(SpecError, match="the spec differs from the run's: evaluation"):
            train(spec_with(**{**RESTLESS, **changed}))


def test_another_least_difference_judges_all_evaluations_anew_where_it_is_allowed(spec_with: SpecWith) -> None:
    least = "evaluation.early_stopping_min_delta"
    eager: dict[str, Any] = {**RESTLESS, "training__learning_rate": 0.01, "evaluation__early_stopping_patience": 2}
    eager["training__tokens_per_pass"] = None
    before = train(spec_with("parts", **eager, evaluation__early_stopping_min_delta=100.0))
    assert (before["steps"], before["stopped_early"]) == (3, True)
    parts = train(spec_with("parts", **eager), allowed_changes=(least,))
    assert parts["steps"] > 3
    whole = train(spec_with("whole", **eager))
    assert_same_outcome(Path(parts["output_dir"]), Path(whole["output_dir"]))


def test_a_run_that_had_all_its_steps_is_finished_whatever_the_patience(spec_with: SpecWith) -> None:
    calm = {"training__num_epochs": 1, "evaluation__early_stopping_patience": 5}
    before = train(spec_with(**calm))
    assert not before["stopped_early"]
    again, events = run_and_record(spec_with(**{**calm, "evaluation__early_stopping_patience": 6}))
    assert again == before
    assert [event.message for event in events if isinstance(event, Notice)] == [
        f"{before['output_dir']} is finished: nothing to do"
    ]


def test_patience_that_was_lowered_ends_the_run_in_an_epoch_without_an_evaluation(spec_with: SpecWith) -> None:
    """The loss of the evaluation that counts is that of an earlier epoch."""
    calm = {**RESTLESS, "training__learning_rate": 0.01, "evaluation__early_stopping_patience": 9}
    calm |= {"evaluation__early_stopping_min_delta": 100.0, "evaluation__every_steps": 3}
    _stop(spec_with(**calm), 7 + 2 * 2)
    run = spec_with(**{**calm, "evaluation__early_stopping_patience": 1})
    summary = train(run, allowed_changes=("evaluation.early_stopping_patience",))
    evaluations = metrics(Path(summary["output_dir"]), "eval")
    assert (summary["steps"], evaluations[-1]["step"]) == (7, 6)
    assert (summary["early_stop"]["step"], summary["early_stop"]["loss"]) == (6, evaluations[-1]["loss"])
