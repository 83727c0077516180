"""A sweep: each adapter is bit-equal to its solo run, also when the sweep is stopped or killed and begun again."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_tools import Crash, files, metrics
from slow_cases import slow
from sweep_tools import GRID, VARIANTS, assert_equal_to_solo_runs, options

from llamatune.errors import NumericsError, SpecError, Stopped
from llamatune.events import EpochDone, Event, Notice, Progress
from llamatune.formats import background_digests
from llamatune.formats.state_json import read_progress
from llamatune.lockstep import Lockstep
from llamatune.model.kernels import choice
from llamatune.sweeping import groups, joint_training
from llamatune.sweeping import run_sweep as sweep_module
from llamatune.sweeping.run_sweep import run_sweep
from llamatune.threads import using_threads
from llamatune.training import model_and_optimizer
from llamatune.training.precision import LossScaler

Command = Callable[..., Any]


OFTEN_ENOUGH = ("targets and seeds", "int8 in fp32, packed, recomputed", "bf16, early stopping")
"""What of it the others show in other company."""


@pytest.mark.parametrize("name", [slow(name) if name in OFTEN_ENOUGH else name for name in VARIANTS])
def test_adapters_that_are_trained_together_are_those_of_solo_runs(
    tmp_path: Path, base_spec: Callable[..., Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, grid = VARIANTS[name]
    monkeypatch.setattr(model_and_optimizer, "LossScaler", partial(LossScaler, scale=2.0**22, growth_interval=2))
    spec, events = base_spec(**changes), list[Event]()
    done = run_sweep(options(spec, tmp_path / "out", *grid), events.append)
    told = [event.message for event in events if isinstance(event, Notice) and "together on one base" in event.message]
    assert len(told) == 1, "all in one group"
    assert told[0].startswith(f"runs 1 to {len(done.runs)} of {len(done.runs)}, together on one base (about ")
    assert {run["status"] for run in done.runs} <= {"finished", "stopped early"}
    if "overflows" in name:
        assert any(metrics(tmp_path / "out" / "runs" / run["name"], "skipped") for run in done.runs)
    if "early" in name:
        assert "stopped early" in {run["status"] for run in done.runs}
    assert_equal_to_solo_runs(tmp_path / "out", spec, *grid)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no cores of a thread to set")
@pytest.mark.parametrize("count", [1, 2])
def test_runs_of_one_thread_take_turns_on_one_core(
    tmp_path: Path, base_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    cores, allowed = list[set[int]](), os.sched_getaffinity(0)
    monkeypatch.setattr(groups, "threads_for", lambda *_: count)

    def note(event: Event) -> None:
        if isinstance(event, Notice) and ": training loss" in event.message:  # told by the thread of the run
            cores.append(os.sched_getaffinity(0))

    run_sweep(options(base_spec(), tmp_path / "out", "lora.r=2,3"), note)
    assert len(cores) >= 2
    assert all(found == cores[0] for found in cores)
    assert (len(cores[0]) == 1) == (count == 1 or len(allowed) == 1)
    assert os.sched_getaffinity(0) == allowed


@pytest.mark.parametrize("least", [0, 1 << 24], ids=["products shared", "products apart"])
def test_runs_of_several_threads_share_the_products_of_large_matrices(
    tmp_path: Path, base_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    """To the same bytes; their threads end with each turn, and a turn is each pass, or each product too."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(joint_training, "_LEAST_SHARED", least)
    asked, released = list[int](), list[int]()
    ask, release = Lockstep.ask, joint_training.release_threads
    monkeypatch.setattr(Lockstep, "ask", lambda self, *more: asked.append(1) or ask(self, *more))
    monkeypatch.setattr(joint_training, "release_threads", lambda: released.append(1) or release())
    spec, grid = base_spec(model__dtype="nf4", lora__dropout=0.1), "lora.r=2,3"
    with using_threads(2):
        run_sweep(options(spec, tmp_path / "out", grid))
        assert bool(asked) == (least == 0)
        assert len(released) > len(asked) / 2
        before = len(asked)
        assert_equal_to_solo_runs(tmp_path / "out", spec, grid)
    assert len(asked) == before


def test_the_base_is_read_once_and_each_matrix_is_cast_once_for_all(
    tmp_path: Path, base_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamatune.model.shared_base import SharedMatrix

    loads, casts, products = [], [], []
    load, unpacked = joint_training.load_own_base, SharedMatrix.unpacked
    forward = SharedMatrix._forward

    def counted_load(*args: Any, **named: Any) -> Any:
        loads.append(1)
        return load(*args, **named)

    monkeypatch.setattr(joint_training, "load_own_base", counted_load)
    monkeypatch.setattr(SharedMatrix, "unpacked", lambda self, dtype: casts.append(1) or unpacked(self, dtype))
    monkeypatch.setattr(
        SharedMatrix, "_forward", lambda self, asked: products.append(len(asked)) or forward(self, asked)
    )
    spec = base_spec(model__dtype="bfloat16", data__shuffle=True)
    run_sweep(options(spec, tmp_path / "out", "lora.r=1,2,3,4"))
    assert loads == [1]
    assert set(products) == {4}, "no adapter ever falls behind"
    modules, layers = 7, 2
    passes = 2 * len(metrics(tmp_path / "out/runs/r=1", "step"))
    assert len(casts) < 2.2 * modules * layers * (passes + 4), "forward and backward, not once for each adapter"


def test_a_sweep_writes_a_table_a_page_and_json_and_leaves_finished_runs(
    tmp_path: Path, base_spec: Callable[..., Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    words = ("sweep", base_spec(), "--grid", "lora.r=2,4", "--output", output)
    done = command(*words, "training.learning_rate=0.01,0.02", "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [axis["key"] for axis in found["axes"]] == ["lora.r", "training.learning_rate"]
    assert [run["values"]["lora.r"] for run in found["runs"]] == ["2", "2", "4", "4"]
    for run in found["runs"]:
        summary = json.loads((Path(run["output_dir"]) / "summary.json").read_text())
        assert run["status"] == "finished"
        assert {key: run[key] for key in ("steps", "train_loss", "best_eval_loss", "trainable_parameters")} == {
            key: summary[key] for key in ("steps", "train_loss", "best_eval_loss", "trainable_parameters")
        }
    assert found["best"] == min(found["runs"], key=lambda run: run["best_eval_loss"])["name"]
    assert {**json.loads((output / "sweep.json").read_text()), "report": found["report"]} == found
    page, table = Path(found["report"]).read_text(), (output / "sweep.md").read_text()
    for run in found["runs"]:
        assert run["name"] in page
        assert f"{run['best_eval_loss']:.4f}" in table
    before = files(output)
    again = command(*words, "training.learning_rate=0.01,0.02")
    assert again.code == 0
    assert f"{found['best']} has the lowest loss" in again.stdout
    assert files(output) == before, "no byte changed"
    more = command(*words, "training.learning_rate=0.02,0.05", "--json")
    assert more.code == 0, more.stderr
    names = {run["name"] for run in json.loads(more.stdout)["runs"]}
    kept = {name: content for name, content in before.items() if name.startswith("runs/")}
    after = files(output)
    assert {name: after[name] for name in kept} == kept, "runs of another grid stay"
    assert len(names) == 4
    assert len({name.split("/")[1] for name in after if name.startswith("runs/")}) == 6
    assert "runs, table and page are in" in again.stdout
    Path(found["report"]).unlink()
    found_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found_spec(name) if name != "matplotlib" else None)
    without = command(*words, "training.learning_rate=0.01,0.02")
    assert "runs and table are in" in without.stdout
    assert "no page without matplotlib" in without.stderr


def test_a_directory_of_a_sweep_is_no_run_and_no_benchmark(
    tmp_path: Path, base_spec: Callable[..., Path], command: Command
) -> None:
    spec, output = base_spec(training__max_steps=1, training__num_epochs=None), tmp_path / "out"
    run_sweep(options(spec, output, "lora.r=2,4"))
    done = command("train", spec, f"training.output_dir={output}")
    assert (done.code, "is no run" in done.stderr) == (5, True), done.stderr
    done = command("benchmark", spec, "--grid", "lora.r=2,4", "--output", output)
    assert (done.code, "holds something else" in done.stderr) == (5, True), done.stderr
    run = next((output / "runs").iterdir())
    done = command("sweep", spec, "--grid", "lora.r=2,4", "--output", run)
    assert (done.code, "holds something else" in done.stderr) == (5, True), done.stderr
    run_sweep(options(spec, output, "lora.r=2,4", overwrite=True))
    assert (tmp_path / "out.old-1" / "runs").is_dir()


class CountedStop:
    """Asks for a stop from its ``number``-th question on."""

    def __init__(self, number: int) -> None:
        self.left = number

    def should_stop(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("number", [0, 9, slow(2), slow(17), slow(30)])
def test_a_sweep_that_is_stopped_goes_on_to_the_same_bytes(tmp_path: Path, grid_spec: Path, number: int) -> None:
    spec, output = grid_spec, tmp_path / "out"
    with pytest.raises(Stopped, match=r"^r=\d,.* stopped .*; \d of 4 runs are finished"):
        run_sweep(options(spec, output, *GRID), should_stop=CountedStop(number).should_stop)
    run_sweep(options(spec, output, *GRID))
    assert_equal_to_solo_runs(output, spec, *GRID)


@pytest.mark.parametrize("place", [7, 16, slow(1), slow(11), slow(19)])
def test_a_sweep_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path, grid_spec: Path, place: int) -> None:
    """The members are killed at different windows, some before and some after a save."""
    spec, output = grid_spec, tmp_path / "out"
    seen = iter(range(place + 1))

    def die(event: Event) -> None:
        if isinstance(event, Notice | Progress) and next(seen) == place:
            raise Crash

    with pytest.raises(Crash):
        run_sweep(options(spec, output, *GRID), die)
    run_sweep(options(spec, output, *GRID))
    assert_equal_to_solo_runs(output, spec, *GRID)


@pytest.mark.parametrize("at_once", [None, 1])
def test_a_sweep_that_a_time_limit_stops_says_so(
    tmp_path: Path, base_spec: Callable[..., Path], at_once: int | None
) -> None:
    spec = base_spec(training__max_time="00:00:01", training__num_epochs=900, evaluation__every_steps=90)
    with pytest.raises(Stopped, match=r"^r=2 stopped \d s before training.max_time after step \d+ of .* 0 of 2 runs"):
        run_sweep(options(spec, tmp_path / "out", "lora.r=2,4", at_once=at_once))


def test_the_time_of_a_sweep_is_that_of_all_its_runs(tmp_path: Path, base_spec: Callable[..., Path]) -> None:
    """A run that begins when the time is over is stopped, and a finished one is read."""
    spec, output = base_spec(training__max_time="1h"), tmp_path / "out"
    run_sweep(options(spec, output, "lora.r=2,4", at_once=1))
    shutil.rmtree(output / "runs" / "r=4")
    with pytest.raises(Stopped, match=r"^r=4 stopped 0 s before training.max_time .*; 1 of 2 runs are finished"):
        run_sweep(options(spec, output, "lora.r=2,4", at_once=1), began_s=time.monotonic() - 3600)


def test_kernels_are_those_of_a_solo_run_also_when_another_run_has_ended(
    tmp_path: Path, base_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "triton_runs_on", lambda device: True)
    monkeypatch.setattr(choice, "kernel_fault", lambda device: None)
    used = list[str | None]()

    def note(event: Event) -> None:
        if isinstance(event, Progress) and event.task.startswith("updates"):
            used.append(choice._device_type)

    run_sweep(options(base_spec(), tmp_path / "out", "training.max_steps=1,3", at_once=2), note)
    assert used
    assert set(used[:-1]) == {"cuda"}  # the last is of the sweep, which has ended
    assert choice._device_type is None


def test_another_number_at_once_continues_to_the_same_bytes(tmp_path: Path, grid_spec: Path) -> None:
    spec, output = grid_spec, tmp_path / "out"
    with pytest.raises(Stopped):
        run_sweep(options(spec, output, *GRID, at_once=3), should_stop=CountedStop(12).should_stop)
    with pytest.raises(Stopped):
        run_sweep(options(spec, output, *GRID, at_once=1), should_stop=CountedStop(3).should_stop)
    run_sweep(options(spec, output, *GRID, at_once=2))
    assert_equal_to_solo_runs(output, spec, *GRID)


def test_a_run_that_diverges_is_a_result_and_the_others_are_trained(
    tmp_path: Path, base_spec: Callable[..., Path], command: Command
) -> None:
    spec, output = base_spec(), tmp_path / "out"
    grid = ("training.learning_rate=0.01,1e30,0.02",)
    done = command("sweep", spec, "--grid", *grid, "--output", output, "--json")
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert [run["status"] for run in found["runs"]] == ["finished", "not finite", "finished"]
    assert "learning_rate=1e30: " in done.stderr
    assert found["runs"][1]["reason"] in (output / "sweep.md").read_text().replace("\\", "")
    assert_equal_to_solo_runs(output, spec, "training.learning_rate=0.01,0.02")
    with pytest.raises(NumericsError):
        run_sweep(options(spec, tmp_path / "all", "training.learning_rate=1e30,1e31"))


def test_a_combination_that_is_refused_is_a_result_and_a_value_that_cannot_be_is_none(
    tmp_path: Path, base_spec: Callable[..., Path], command: Command
) -> None:
    spec, output = base_spec(training__num_epochs=None, training__max_steps=1), tmp_path / "out"
    done = command("sweep", spec, "--grid", "training.precision=fp32", "--grid",
                   "training.activation_checkpointing=none,projections", "training.fused=false",
                   "--output", output, "--json")  # fmt: skip
    assert done.code == 0, done.stderr
    assert [run["status"] for run in json.loads(done.stdout)["runs"]] == ["finished", "refused"]
    assert "warning" in done.stderr
    wrong = command("sweep", spec, "--grid", "lora.r=2,sixty", "--output", tmp_path / "other")
    assert (wrong.code, wrong.stdout) == (2, "")
    assert "lora.r: should be a valid integer" in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_a_fault_that_is_no_result_is_raised_when_the_others_are_trained(
    tmp_path: Path, base_spec: Callable[..., Path]
) -> None:
    spec, output = base_spec(), tmp_path / "out"
    run_sweep(options(spec, output, "lora.r=2,4"))
    changed = base_spec(training__weight_decay=0.5)
    shutil.rmtree(output / "runs" / "r=4")
    with pytest.raises(SpecError, match="weight_decay"):
        run_sweep(options(changed, output, "lora.r=2,4"))
    assert (output / "runs" / "r=4" / "summary.json").is_file()


def test_inputs_that_cannot_be_opened_are_told_of_once(
    tmp_path: Path, base_spec: Callable[..., Path], command: Command
) -> None:
    spec = base_spec(data__train=str(tmp_path / "absent"))
    done = command("sweep", spec, "--grid", "lora.r=2,4", "--output", tmp_path / "out")
    assert (done.code, done.stdout) == (3, ""), done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_as_many_at_once_as_the_plan_allows(
    tmp_path: Path, base_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = base_spec()
    members = sweep_module.plan_members(options(spec, tmp_path / "planned", *GRID))[1]
    room = sweep_module.room_for(members, False)
    assert room.at_once == 4
    limit = room.base_bytes + 2 * room.own_bytes + room.own_bytes // 2
    small = base_spec(training__memory_limit=f"{limit / 2**20}MiB")
    counts: list[int] = []
    trained = sweep_module.train_together

    def counted(batch: list[Any], *more: Any) -> Any:
        counts.append(len(batch))
        return trained(batch, *more)

    monkeypatch.setattr(sweep_module, "train_together", counted)
    events: list[Event] = []
    run_sweep(options(small, tmp_path / "out", *GRID), events.append)
    assert counts == [2, 2]
    told = [event.message for event in events if isinstance(event, Notice) and "together" in event.message]
    assert all("(about " in message and " KiB of " in message for message in told), told
    counts.clear()
    run_sweep(options(spec, tmp_path / "three", *GRID, at_once=3))
    assert counts == [3]
    counts.clear()
    run_sweep(options(spec, tmp_path / "one", *GRID, at_once=1))
    assert counts == []


def test_events_name_the_run_and_count_all_updates(tmp_path: Path, base_spec: Callable[..., Path]) -> None:
    events: list[Event] = []
    run_sweep(options(base_spec(), tmp_path / "out", "lora.r=2,4"), events.append)
    counted = [(event.done, event.total) for event in events if isinstance(event, Progress) and "updates" in event.task]
    assert counted[-1] == (6, 6)
    assert [done for done, _ in counted] == sorted(done for done, _ in counted)
    lines = [event.message for event in events if isinstance(event, Notice)]
    for name in ("r=2", "r=4"):
        assert any(line.startswith(f"{name}: step 2: validation loss ") for line in lines)
        assert any(line.startswith(f"{name}: epoch 1 of 1: training loss ") for line in lines)
    assert not any(isinstance(event, EpochDone) for event in events)


def test_the_base_of_runs_that_are_trained_together_is_digested_once(
    base_spec: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = background_digests.open_regular
    monkeypatch.setattr(background_digests, "open_regular", lambda path: opened.append(str(path)) or real(path))
    spec = base_spec(model__verify="full", training__max_steps=3, training__num_epochs=None)
    done = run_sweep(options(spec, tmp_path / "sweep", "lora.r=2,3", "training.max_steps=2,3"))
    assert [run["status"] for run in done.runs] == ["finished"] * 4
    assert len(opened) == len(set(opened)) > 1
    recorded = [read_progress(path).base_files for path in sorted((tmp_path / "sweep").rglob("step-00000[23]"))]
    assert len(recorded) == 4
    assert recorded[0] is not None
    assert all(found == recorded[0] for found in recorded)
    assert {Path(path).name for path in opened} == set(recorded[0])
