"""Ranks that are stopped, killed, suspended or out of memory: all end together, and the same command goes on.

Whatever happened, on however many ranks the run goes on, it ends in the bytes of one process that nothing disturbed.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_tools import EndOfAll, launch, run_ranks, wait_for
from run_tools import assert_same_outcome, last_checkpoint, metrics, outcome
from slow_cases import slow
from tracing import changing_calls, fault_options, record_options
from warm import NO_STRACE, Warm, strace

from llamatune.training.run_lock import run_lock

STEPS, SAVE_EVERY, TIMEOUT_S = 26, 5, 4.0
VANISHED = "another rank ended, or did not answer in time"
LEFTOVERS = (".llamatune-tmp-", ".trash-")
Command = list[str]


@pytest.fixture(scope="module")
def command(rank_job: Callable[..., Command]) -> Command:
    return rank_job(
        training__max_steps=STEPS, training__save_every_steps=SAVE_EVERY, training__rank_timeout_s=TIMEOUT_S,
        evaluation__every_steps=10,
        training__learning_rate=0.03, data__packing=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(warm_ranks: Warm, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that nothing disturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(warm_ranks, at(command, run), 1)
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def at(command: Command, run: Path) -> Command:
    return [*command, f"training.output_dir={run}"]


def until_step(run: Path, step: int, launched: Any) -> None:
    wait_for(run / "metrics.jsonl", f'"step": {step},', launched)


def finish(warm: Warm, command: Command, run: Path, whole: Path, size: int) -> None:
    """The same command on ``size`` ranks ends as if nothing had happened."""
    run_ranks(warm, at(command, run), size)
    assert_same_outcome(run, whole)
    assert not [path for path in run.rglob("*") if path.name.startswith(LEFTOVERS)]


# Stopping


@pytest.mark.parametrize(
    ("size", "rank"), [(2, 1), (4, 0), (4, 2), *(slow(*case) for case in [(1, 0), (2, 0), (3, 2), (4, 1), (4, 3)])]
)
def test_a_stop_of_any_rank_stops_all_at_one_step(
    warm_ranks: Warm, command: Command, whole: Path, run: Path, size: int, rank: int
) -> None:
    launched = launch(warm_ranks, at([*command, "training.save_every_steps=1000"], run), size)
    until_step(run, 7, launched)
    launched.signal(rank, signal.SIGTERM)
    end = launched.ended()
    assert (end.codes, end.printed, len(end.errors)) == ([75] * size, [], 1), end
    assert end.errors[0].startswith("error: stopped by a signal after step ")
    (saved,) = (run / "checkpoints").iterdir()
    stopped_at = metrics(run, "step")[-1]["step"]
    assert saved.name == f"step-{stopped_at:06d}"
    assert 7 <= stopped_at < STEPS


def test_a_stop_of_all_ranks_is_one_line(warm_ranks: Warm, command: Command, run: Path) -> None:
    """Slurm sends its signals to every process."""
    launched = launch(warm_ranks, at(command, run), 4)
    until_step(run, 3, launched)
    for rank in range(4):
        launched.signal(rank, signal.SIGTERM)
    end = launched.ended()
    assert (end.codes, len(end.errors)) == ([75] * 4, 1), end


def test_a_run_goes_on_with_other_numbers_of_ranks(warm_ranks: Warm, command: Command, whole: Path, run: Path) -> None:
    for size, rank, step in ((2, 1, 6), (4, 2, 14), (1, 0, 19)):
        launched = launch(warm_ranks, at(command, run), size)
        until_step(run, step, launched)
        launched.signal(rank, signal.SIGTERM)
        assert launched.ended().codes == [75] * size
        assert last_checkpoint(run).name < f"step-{STEPS:06d}"
    finish(warm_ranks, command, run, whole, 2)


def test_a_run_keeps_the_passes_that_were_chosen_for_its_first_ranks(
    warm_ranks: Warm, rank_job: Callable[..., Command], tmp_path: Path
) -> None:
    command, run = rank_job(training__tokens_per_pass="auto"), tmp_path / "run"
    run_ranks(warm_ranks, at(command, tmp_path / "on-4"), 4)
    launched = launch(warm_ranks, at(command, run), 4)
    until_step(run, 4, launched)
    launched.signal(3, signal.SIGTERM)
    assert launched.ended().codes == [75] * 4
    rule = json.loads((run / "origin.json").read_text())["passes"]
    assert rule["at_least"] == 4
    finish(warm_ranks, command, run, tmp_path / "on-4", 1)
    assert json.loads((run / "origin.json").read_text())["passes"] == rule
    run_ranks(warm_ranks, at(command, tmp_path / "alone"), 1)  # the control: one process would have chosen others
    assert outcome(tmp_path / "alone")["optimizer"] != outcome(run)["optimizer"]


# Vanishing


@pytest.mark.parametrize(("size", "rank", "then"), [(2, 0, 4), (4, 3, 2), slow(2, 1, 1), slow(4, 0, 2)])
def test_a_killed_rank_ends_the_others(
    warm_ranks: Warm, command: Command, whole: Path, run: Path, size: int, rank: int, then: int
) -> None:
    launched = launch(warm_ranks, at(command, run), size)
    until_step(run, 8, launched)
    launched.signal(rank, signal.SIGKILL)
    began = time.monotonic()
    judge_vanished(launched.ended(), rank, size)
    assert time.monotonic() - began < 15
    assert last_checkpoint(run).name >= "step-000005"
    finish(warm_ranks, command, run, whole, then)


def judge_vanished(end: EndOfAll, rank: int, size: int) -> None:
    assert end.codes == [-signal.SIGKILL if number == rank else 5 for number in range(size)], end
    assert len(end.errors) == 1, end.errors
    assert VANISHED in end.errors[0]
    assert "the same command goes on" in end.errors[0]


@pytest.mark.parametrize(("rank", "size"), [(0, 2), slow(1, 4), slow(0, 4)])
def test_a_suspended_rank_ends_the_others_within_the_timeout(
    warm_ranks: Warm, command: Command, whole: Path, run: Path, rank: int, size: int
) -> None:
    launched = launch(warm_ranks, at(command, run), size)
    until_step(run, 8, launched)
    launched.signal(rank, signal.SIGSTOP)
    began = time.monotonic()
    for number, process in enumerate(launched.processes):
        if number != rank:
            assert process.ended_within(30)
    assert time.monotonic() - began < TIMEOUT_S + 8
    launched.signal(rank, signal.SIGKILL)
    judge_vanished(launched.ended(), rank, size)
    finish(warm_ranks, command, run, whole, 1)


def test_rank_0_may_write_longer_than_the_timeout(trained: Callable[..., Path], alone: Callable[..., Path]) -> None:
    changes = {"training__max_steps": 1, "training__rank_timeout_s": 1.0, "evaluation__every_steps": 1}
    slowly = {"broken": "broken_ranks.slow_writer", "environment": {"SLOW_S": "1.5"}}
    assert_same_outcome(trained(2, changes, **slowly), alone(changes))


# Errors of one rank


def judge_error(end: EndOfAll, code: int, text: str) -> None:
    assert end.codes == [code] * len(end.ranks), end
    assert (end.printed, len(end.errors)) == ([], 1), end.errors
    assert text in end.errors[0]


def test_an_occupied_directory(warm_ranks: Warm, command: Command, run: Path) -> None:
    run.mkdir()
    (run / "thesis.tex").write_text("mine")
    end = launch(warm_ranks, at(command, run), 3).ended()
    judge_error(end, 5, "error: the directory is not empty and is no run")
    assert end.ranks[0].stderr
    assert [path.name for path in run.iterdir()] == ["thesis.tex"]


def test_a_lock_that_another_run_holds(warm_ranks: Warm, command: Command, run: Path) -> None:
    run.mkdir()
    with run_lock(run):
        judge_error(launch(warm_ranks, at(command, run), 3).ended(), 5, "in use by process")


@pytest.mark.parametrize("rank", [2, slow(0)])
def test_a_rank_without_memory(warm_ranks: Warm, command: Command, run: Path, rank: int) -> None:
    end = launch(warm_ranks, at(command, run), 3, {rank: {"broken": "broken_ranks.out_of_memory"}}).ended()
    judge_error(end, 5, "error: out of memory on cpu")
    assert "error:" in end.ranks[rank].stderr


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["training.learning_rate=0.5"], 5, "error: rank 1 has another spec than rank 0"),
        (["training.learning_rate=fast"], 2, "training.learning_rate"),
        (["model.path=absent"], 4, "absent"),
    ],
)
def test_a_rank_with_another_spec(
    warm_ranks: Warm, command: Command, run: Path, words: list[str], code: int, text: str
) -> None:
    own = {1: {"arguments": [*at(command, run), *words]}}
    judge_error(launch(warm_ranks, at(command, run), 3, own).ended(), code, text)
    assert not run.exists()


def test_a_rank_that_sees_other_rows(
    warm_ranks: Warm, command: Command, run: Path, rows_of: Callable[[int], Path]
) -> None:
    own = {2: {"arguments": [*at(command, run), f"data.train={rows_of(95)}"]}}
    judge_error(launch(warm_ranks, at(command, run), 3, own).ended(), 5, "rank 2 has another ")


def test_a_bug_of_one_rank_is_one_traceback(warm_ranks: Warm, command: Command, run: Path) -> None:
    end = launch(warm_ranks, at(command, run), 2, {1: {"broken": "broken_ranks.bug"}}).ended()
    assert end.codes == [1, 1], end
    assert end.ranks[1].stderr.count("Traceback") == 1
    assert "AssertionError: a bug" in end.ranks[1].stderr
    assert not [line for line in end.ranks[0].stderr.splitlines() if "Traceback" in line]


# Every call of a save, and any moment


def at_every_call(warm: Warm, command: Command, whole: Path, scratch: Path, fault: str, chosen: slice) -> Counter[str]:
    """Kill rank 0 before each call of the second save, or let the call fail; then go on, each time on other ranks."""
    log, seen = scratch / "log", Counter[str]()
    (scratch / "traced").mkdir()
    run_ranks(warm, at(command, scratch / "traced" / "run"), 2, own={0: {"tracing": record_options(), "log": log}})
    saving = [call for call in changing_calls(log, scratch / "traced") if "step-000010" in call.text]
    assert len(saving) > 15
    for number, call in enumerate(saving[chosen]):
        place = scratch / "place"
        tracing = {0: {"tracing": fault_options(call, fault), "log": log}}
        end = launch(warm, at(command, place / "run"), 2, tracing).ended()
        if end.codes == [0, 0] and fault != "kill":  # an old checkpoint that cannot be removed ends no run
            seen["went on"] += 1
            assert_same_outcome(place / "run", whole)
        elif fault == "kill":
            judge_vanished(end, 0, 2)
            seen["killed"] += 1
        else:
            judge_error(end, 5, str(place))
            assert "error: " in end.ranks[0].stderr
            seen["all left with 5"] += 1
        if end.codes != [0, 0]:
            finish(warm, command, place / "run", whole, (1, 2, 4)[number % 3])
        shutil.rmtree(place)
    return seen


@pytest.mark.skipif(strace() is None, reason=NO_STRACE)
@pytest.mark.parametrize("fault", ["kill", slow("ENOSPC")])
def test_a_fault_at_some_calls_of_a_save(
    warm_ranks: Warm, command: Command, whole: Path, tmp_path: Path, fault: str, tell: Callable[[str], None]
) -> None:
    tell(str(at_every_call(warm_ranks, command, whole, tmp_path, fault, slice(7, None, 19))))


@pytest.mark.slow
@pytest.mark.skipif(strace() is None, reason=NO_STRACE)
@pytest.mark.parametrize("fault", ["kill", "ENOSPC", "EIO"])
def test_a_fault_at_any_call_of_a_save(
    warm_ranks: Warm, command: Command, whole: Path, tmp_path: Path, fault: str, tell: Callable[[str], None]
) -> None:
    tell(str(at_every_call(warm_ranks, command, whole, tmp_path, fault, slice(None))))


def disturbed(warm: Warm, command: Command, whole: Path, scratch: Path, number: int, times: int, seed: int) -> str:
    """Runs in which a signal comes to a random rank at a random moment, a few times each, on 1, 2 or 4 ranks."""
    chance, codes, done, runs = random.Random(seed), Counter[str](), 0, 0
    while done < times:
        run, runs = scratch / f"run-{runs}", runs + 1
        for left in range(5, -1, -1):
            size = chance.choice((1, 2, 4))
            launched = launch(warm, at(command, run), size)
            rank = chance.randrange(size)
            if left and not launched.processes[rank].ended_within(chance.uniform(0, 2.2)):
                launched.signal(rank, number)
            end = launched.ended(90)
            others = {code for place, code in enumerate(end.codes) if place != rank or code != -signal.SIGKILL}
            codes[f"{size} ranks: {end.codes[rank]}, others {sorted(others)}"] += 1
            assert len(others) <= 1, (size, rank, end)
            assert len(end.errors) <= 1, (size, rank, end.errors)
            done += end.codes[rank] != 0
            if others == {0}:  # also where the signal came after the end of the run
                break
            assert others <= {5 if number == signal.SIGKILL else 75}, (size, rank, end)
        assert others == {0}
        assert_same_outcome(run, whole)
        assert not [path for path in run.rglob("*") if path.name.startswith(LEFTOVERS)]
        shutil.rmtree(run)
    return f"{done} times in {runs} runs, one outcome: {dict(sorted(codes.items()))}"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGKILL, 60), (signal.SIGTERM, 60)])
def test_signals_at_random_moments_change_nothing(
    warm_ranks: Warm, command: Command, whole: Path, tmp_path: Path, number: int, times: int,
    tell: Callable[[str], None],
) -> None:  # fmt: skip
    tell(disturbed(warm_ranks, command, whole, tmp_path, number, times, seed=3))
