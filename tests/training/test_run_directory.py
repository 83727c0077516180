"""What a run directory lets a second command do, and what it refuses."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_tools import StopAfter, assert_same_outcome, files, losses, make_spec, metrics

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.prepare import prepare_data
from llamatune.errors import CheckpointError, EnvironmentFault, SpecError, Stopped
from llamatune.events import Event, Notice, RunStarted
from llamatune.spec import RunSpec, load_spec
from llamatune.training.train import plan_training, train


@pytest.fixture
def spec_with(tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path) -> Callable[..., RunSpec]:
    """The same run, with changes."""
    return lambda **changes: make_spec(tiny_base(), prepared(), tmp_path / "run", **changes)


@pytest.fixture
def stopped(spec_with: Callable[..., RunSpec], tmp_path: Path) -> Path:
    """The directory of a run that was stopped after two of its four steps."""
    stop = StopAfter(2)
    with pytest.raises(Stopped):
        train(spec_with(), on_event=stop.on_event, should_stop=stop.should_stop)
    return tmp_path / "run"


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"training__learning_rate": 0.02}, "training.learning_rate: 0.01 -> 0.02"),
    ({"training__micro_batch_size": 2}, "training.micro_batch_size: 3 -> 2"),
    ({"training__seed": 1}, "training.seed: 0 -> 1"),
    ({"data__shuffle": False}, "data.shuffle: True -> False"),
    ({"lora__r": 5}, "lora.r: 4 -> 5"),
    ({"model__dtype": "bfloat16"}, "model.dtype: float32 -> bfloat16"),
    ({"training__max_grad_norm": None}, "training.max_grad_norm: 1.0 -> None"),
    ({"training__save_every_steps": 2}, "training.save_every_steps: None -> 2"),
]


@pytest.mark.parametrize(("change", "shown"), CHANGES, ids=[shown.split(":")[0] for _, shown in CHANGES])
def test_a_changed_field_is_refused_and_shown(
    stopped: Path, spec_with: Callable[..., RunSpec], change: dict[str, Any], shown: str
) -> None:
    before = files(stopped)
    with pytest.raises(SpecError, match="the spec differs") as raised:
        train(spec_with(**change))
    assert shown in str(raised.value)
    assert str(raised.value).endswith(f"or pass --allow-spec-change {shown.partition(':')[0]}")
    assert raised.value.exit_code == 2
    assert files(stopped) == before


def test_a_removed_lora_section_is_a_change(stopped: Path, spec_with: Callable[..., RunSpec]) -> None:
    with pytest.raises(SpecError, match=r"lora"):
        train(spec_with(lora=None))


def test_fewer_epochs_than_were_planned_are_a_change(spec_with: Callable[..., RunSpec]) -> None:
    train(spec_with(training__num_epochs=2))
    with pytest.raises(SpecError, match=r"training\.num_epochs: 2 -> 1"):
        train(spec_with())


def test_an_allowed_change_is_accepted_and_recorded(stopped: Path, spec_with: Callable[..., RunSpec]) -> None:
    train(spec_with(training__learning_rate=0.02), allowed_changes=("training.learning_rate",))
    assert [line["learning_rate"] for line in metrics(stopped, "step")] == [0.01, 0.01, 0.02, 0.02]
    assert load_spec(stopped / "spec.yaml").training.learning_rate == 0.02


def test_logging_and_what_is_kept_may_change(stopped: Path, spec_with: Callable[..., RunSpec]) -> None:
    assert train(spec_with(training__log_every_steps=2, training__keep_last=1))["steps"] == 4


def test_other_rows_under_the_same_name_are_refused(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tiny_rows: Path, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared(), data)
    spec, stop = make_spec(tiny_base(), data, tmp_path / "run"), StopAfter(2)
    with pytest.raises(Stopped):
        train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    before = files(tmp_path / "run")
    options = PrepareOptions([tiny_rows], tiny_tokenizer, data, max_seq_length=40, skip_bad_rows=9, overwrite=True)
    prepare_data(options)
    with pytest.raises(CheckpointError, match="train: ") as raised:
        train(spec)
    assert raised.value.exit_code == 4
    assert files(tmp_path / "run") == before


def test_another_base_under_the_same_name_is_refused(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base(), base)
    spec, stop = make_spec(base, prepared(), tmp_path / "run"), StopAfter(2)
    with pytest.raises(Stopped):
        train(spec, on_event=stop.on_event, should_stop=stop.should_stop)
    shutil.copy(tiny_base(initializer_range=0.1) / "model.safetensors", base)
    with pytest.raises(CheckpointError, match="base: "):
        train(spec)


def test_a_directory_with_foreign_files_is_left_alone(spec_with: Callable[..., RunSpec], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("all of it")
    with pytest.raises(EnvironmentFault, match="not empty") as raised:
        train(spec_with())
    assert raised.value.exit_code == 5
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_resume_never_refuses_a_run_and_overwrite_moves_it_aside(
    stopped: Path, spec_with: Callable[..., RunSpec]
) -> None:
    before = files(stopped)
    with pytest.raises(EnvironmentFault):
        train(spec_with(), resume=False)
    assert files(stopped) == before
    assert train(spec_with(training__seed=5), overwrite=True)["steps"] == 4
    moved = [path for path in stopped.parent.iterdir() if path != stopped and files(path).keys() == before.keys()]
    assert len(moved) == 1
    assert files(moved[0]) == before


def test_a_second_run_in_the_same_directory_is_refused_at_once_and_harms_nothing(
    spec_with: Callable[..., RunSpec], tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    refusals = []

    def intrude(event: object) -> None:
        if type(event).__name__ == "StepDone" and not refusals:
            for overwrite in (False, True):
                with pytest.raises(EnvironmentFault, match="in use by") as raised:
                    train(spec_with(), overwrite=overwrite)
                refusals.append(raised.value)

    train(spec_with(), on_event=intrude)
    assert {fault.exit_code for fault in refusals} == {5}
    assert all(f"process {os.getpid()} on {os.uname().nodename} since 20" in str(fault) for fault in refusals)
    train(make_spec(tiny_base(), prepared(), tmp_path / "alone"))
    assert_same_outcome(tmp_path / "run", tmp_path / "alone")


def test_no_checkpoint_beyond_keep_last_stays_and_the_newest_does(
    spec_with: Callable[..., RunSpec], tmp_path: Path
) -> None:
    train(spec_with(training__save_every_steps=1, training__max_steps=7, training__keep_last=3))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-000005", "step-000006", "step-000007",
    ]  # fmt: skip


def test_the_newest_good_checkpoint_is_kept_though_a_damaged_one_is_newer(
    stopped: Path, spec_with: Callable[..., RunSpec]
) -> None:
    """A resumed run that saves step 3 beside a damaged step 4 must not delete step 3 for it."""
    shutil.copytree(stopped / "checkpoints" / "step-000002", stopped / "checkpoints" / "step-000004")
    (stopped / "checkpoints" / "step-000004" / "state.json").write_text("{}")
    stop = StopAfter(1)
    with pytest.raises(Stopped):
        train(spec_with(training__keep_last=1), on_event=stop.on_event, should_stop=stop.should_stop)
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == ["step-000003", "step-000004"]
    assert train(spec_with(training__keep_last=1))["steps"] == 4
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step-000004"]


def test_a_run_that_was_killed_before_it_pruned_prunes_when_it_resumes(
    stopped: Path, spec_with: Callable[..., RunSpec]
) -> None:
    shutil.copytree(stopped / "checkpoints" / "step-000002", stopped / "checkpoints" / "step-000001")
    began: list[RunStarted] = []

    def observe(event: Event) -> None:
        if isinstance(event, RunStarted):
            began.append(event)

    with pytest.raises(Stopped):
        train(spec_with(training__keep_last=1), on_event=observe, should_stop=lambda: bool(began))
    assert began[0].resumed_step == 2
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step-000002"]


def test_a_checkpoint_that_could_not_be_removed_is_said_and_tried_again_by_the_next_run(
    stopped: Path, spec_with: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def observe(event: Event) -> None:
        if isinstance(event, Notice) and event.kind == "warning":
            said.append(event.message)

    def refused(source: Path, target: Path) -> None:
        if ".trash-" in str(target):
            raise PermissionError(1, "Operation not permitted")
        rename(source, target)

    def names() -> list[str]:
        return sorted(path.name for path in (stopped / "checkpoints").iterdir())

    rename = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        train(spec_with(training__keep_last=1))  # finishes
        kept = names()
        assert len(kept) > 1
        said.clear()
        train(spec_with(training__keep_last=1), on_event=observe)  # finished: says so and tries again
        assert len(said) == len(kept) - 1
        assert all("could not remove the old checkpoint" in line for line in said)
        assert names() == kept
    (stopped / "checkpoints" / ".trash-step-000001").mkdir()
    said.clear()
    train(spec_with(training__keep_last=1), on_event=observe)
    assert (said, names()) == ([], kept[-1:])


def test_leftovers_of_a_killed_process_are_removed_and_only_those(
    stopped: Path, spec_with: Callable[..., RunSpec]
) -> None:
    """Under the run's lock the process that left them is gone, whoever has its number now (here: us)."""
    ours = [f".llamatune-tmp-{os.getpid()}-{name}" for name in ("origin.json", "spec.yaml", "summary.json", "best")]
    in_checkpoints = [f".llamatune-tmp-{os.getpid()}-step-000003", ".trash-step-000001"]
    foreign = [f".llamatune-tmp-{os.getpid()}-merged", ".llamatune-tmp-notes", "notes.txt"]
    for name in [*ours, *foreign]:
        (stopped / name).write_text("half a file")
    for name in in_checkpoints:
        (stopped / "checkpoints" / name).mkdir()
        (stopped / "checkpoints" / name / "state.json").write_text("{")
    train(spec_with())
    names = {path.name for path in stopped.rglob("*")}
    assert names >= set(foreign)
    assert not names & {*ours, *in_checkpoints}


def test_a_log_that_cannot_be_written_is_named(stopped: Path, spec_with: Callable[..., RunSpec]) -> None:
    (stopped / "metrics.jsonl").unlink()
    (stopped / "metrics.jsonl").symlink_to("/dev/full")
    shutil.rmtree(stopped / "checkpoints")
    with pytest.raises(EnvironmentFault, match=r"metrics\.jsonl") as raised:
        train(spec_with())
    assert raised.value.exit_code == 5


def test_a_disk_too_small_for_a_checkpoint_is_told_before_the_model_is_loaded(
    spec_with: Callable[..., RunSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1 << 20))
    with pytest.raises(EnvironmentFault, match=r"a checkpoint needs 23,040 bytes and 1,048,576 are free"):
        train(spec_with())
    assert not (tmp_path / "run").exists()


def test_no_secret_of_the_environment_is_written(
    stopped: Path, spec_with: Callable[..., RunSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {
        "HF_TOKEN": "hf_qwertyuiop",
        "WANDB_API_KEY": "0123456789abcdef",
        "AWS_SECRET_KEY": "xyzzyx/plugh",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    train(spec_with())
    written = b"".join(files(stopped).values())
    assert written
    assert not [name for name, value in secrets.items() if name.encode() in written or value.encode() in written]


def test_best_is_kept_though_it_is_long_past(
    tiny_base: Callable[..., Path], prepared: Callable[..., Path], tmp_path: Path
) -> None:
    """A rate so high that the first evaluations are the best; ``best/`` is the adapter of that very step."""
    data, run = prepared(validation_fraction=0.25, seed=3), tmp_path / "run"
    high = {"training__learning_rate": 3.0, "evaluation__every_steps": 1, "training__save_every_steps": 1}
    summary = train(make_spec(tiny_base(), data, run, training__max_steps=8, training__keep_last=9, **high))
    _, *evaluations = metrics(run, "eval")
    best = min(evaluations, key=lambda line: line["loss"])
    assert (summary["best_step"], summary["best_eval_loss"]) == (best["step"], best["loss"])
    assert best["step"] < 8
    stored = run / "checkpoints" / f"step-{best['step']:06d}" / "adapter_model.safetensors"
    assert (run / "best" / "adapter_model.safetensors").read_bytes() == stored.read_bytes()


def test_a_dry_run_counts_everything_and_writes_nothing(spec_with: Callable[..., RunSpec], tmp_path: Path) -> None:
    plan = plan_training(spec_with(training__num_epochs=3))
    assert (plan["total_steps"], plan["windows_per_epoch"], plan["train_rows"]) == (12, 4, 23)
    assert plan["trainable_parameters"] == 3 * 4 * ((48 + 48) + (48 + 16))
    assert not (tmp_path / "run").exists()


def test_the_summary_holds_what_was_measured(stopped: Path, spec_with: Callable[..., RunSpec]) -> None:
    summary = train(spec_with())
    lines = metrics(stopped, "step")
    tokens = sum(line["target_tokens"] for line in lines)
    assert summary["steps"] == 4
    assert summary["train_loss"] == pytest.approx(sum(x["loss"] * x["target_tokens"] for x in lines) / tokens)
    assert summary["total_parameters"] - summary["trainable_parameters"] == 3 * (
        2 * 48 * 48 + 2 * 16 * 48 + 3 * 48 * 100 + 2 * 48) + 48 + 2 * 131 * 48  # fmt: skip
    assert summary["runtime_s"] > 0
    assert summary["peak_memory_bytes"] > 10 << 20
    assert losses(stopped)[0] > 0
