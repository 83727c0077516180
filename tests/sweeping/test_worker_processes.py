"""A sweep in several processes: the bytes of runs alone; stopped, killed, with a worker that dies or has a bug."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest
from broken_worker import KINDS, fault_of
from run_tools import metrics
from slow_cases import slow
from sweep_tools import GRID, VARIANTS, assert_equal_to_solo_runs, options

from llamatune.child_process import start_child
from llamatune.errors import EnvironmentFault
from llamatune.events import Event, Notice, Progress
from llamatune.sweeping import groups, worker_processes
from llamatune.sweeping import run_sweep as sweep_module
from llamatune.sweeping.groups import room_for
from llamatune.sweeping.members import plan_members
from llamatune.sweeping.run_sweep import run_sweep
from llamatune.sweeping.worker_processes import train_in_workers
from llamatune.threads import using_threads

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system tells no cores")
Children = list[subprocess.Popen[bytes]]


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[Children]:
    """The worker processes of the sweeps, of which there are two whatever the machine has; none is left."""
    started: Children = []

    def start(module: str, **how: Any) -> Any:
        child, connection = start_child(module, **how)
        started.append(child)
        return child, connection

    monkeypatch.setattr(groups, "usable_cores", lambda: (sorted(os.sched_getaffinity(0)) * 2)[:2])
    monkeypatch.setattr(worker_processes, "start_child", start)
    yield started
    assert started
    assert all(child.returncode is not None for child in started), "none is left"


def affinities(process: int) -> set[frozenset[int]]:
    """Those of the threads of a process."""
    threads = [int(thread.name) for thread in Path(f"/proc/{process}/task").iterdir()]
    return {frozenset(os.sched_getaffinity(thread)) for thread in threads}


def test_runs_in_two_processes_are_those_of_solo_runs(
    tmp_path: Path, base_spec: Callable[..., Path], children: Children
) -> None:
    """Two runs take turns in one process, the third is alone in the other."""
    grid = ("lora.kind=lora,dora,lora_fa", "training.optimizer=adamw")
    spec, notices = base_spec(model__dtype="bfloat16"), list[str]()
    used: list[set[frozenset[int]]] = [set(), set()]

    def note(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event.message)
        if isinstance(event, Progress) and "updates" in event.task:
            for found, child in zip(used, children, strict=True):
                with contextlib.suppress(OSError):  # it has ended
                    found |= affinities(child.pid)

    allowed = os.sched_getaffinity(0)
    done = run_sweep(options(spec, tmp_path / "out", *grid), note)
    assert [run["status"] for run in done.runs] == ["finished"] * 3
    assert notices[0].startswith("runs 1 to 3 of 3, together in 2 processes (about "), notices[0]
    assert len(children) == 2
    assert frozenset({min(allowed)}) in used[0], "one that takes turns stays on its core"
    assert used[1] == {frozenset(allowed)}, "one that is alone stays nowhere"
    assert os.sched_getaffinity(0) == allowed
    assert_equal_to_solo_runs(tmp_path / "out", spec, *grid)


def test_runs_of_several_threads_in_two_processes_are_those_of_solo_runs(
    tmp_path: Path, base_spec: Callable[..., Path], tiny_base: Callable[..., Path], children: Children,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three threads on one core each: the bits are those of three threads, and they do not spin."""
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    core, used, counts = min(os.sched_getaffinity(0)), set[frozenset[int]](), list[int]()

    def note(event: Event) -> None:
        if isinstance(event, Progress) and "updates" in event.task:
            with contextlib.suppress(OSError):
                used.update(affinities(children[0].pid))
                counts.append(len(list(Path(f"/proc/{children[0].pid}/task").iterdir())))
                assert b"OMP_WAIT_POLICY=passive" in Path(f"/proc/{children[0].pid}/environ").read_bytes()

    base = tiny_base(hidden_size=240, intermediate_size=704, vocab_size=131)
    wide_spec, grid = base_spec(model__path=str(base), training__max_steps=4), "lora.r=2,3,4,5"
    with using_threads(3):
        run_sweep(options(wide_spec, tmp_path / "out", grid), note)
        assert_equal_to_solo_runs(tmp_path / "out", wide_spec, grid)
    assert frozenset({core}) in used
    assert max(counts) >= 2 + 2 * 3, "a listener, and three threads a run"


@pytest.mark.parametrize("name", [slow(name) for name in VARIANTS])
def test_runs_of_every_kind_in_two_processes_are_those_of_solo_runs(
    tmp_path: Path, base_spec: Callable[..., Path], children: Children, name: str
) -> None:
    changes, grid = VARIANTS[name]
    spec = base_spec(**changes)
    run_sweep(options(spec, tmp_path / "out", *grid))
    assert_equal_to_solo_runs(tmp_path / "out", spec, *grid)


@pytest.fixture(scope="module")
def long_spec(base_spec: Callable[..., Path]) -> Path:
    """The spec of the commands that are ended from outside."""
    return base_spec(training__save_every_steps=2, training__max_steps=30, evaluation__every_steps=20)


THREE = "lora.r=2,4,3"
"""Two runs that take turns, and one that is alone."""


def begin(spec: Path, output: Path) -> tuple[subprocess.Popen[bytes], list[int]]:
    """A sweep as a command, in a session of its own, and its workers, once both have begun to train."""
    words = ["sweep", spec, "--output", output, "--grid", THREE]
    command = [sys.executable, str(Path(__file__).with_name("sweep_command.py")), *map(str, words)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    sweep = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while len([run for run in output.glob("runs/*") if list(run.glob("checkpoints/step-*"))]) < 2:
        assert sweep.poll() is None, sweep.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    listed = Path(f"/proc/{sweep.pid}/task").glob("*/children")
    return sweep, [int(child) for file in listed for child in file.read_text().split()]


def is_there(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def wait_for_end(processes: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_there, processes)):
        assert time.monotonic() < deadline, "a worker outlives the sweep"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended_goes_on_to_the_same_bytes(
    tmp_path: Path, long_spec: Path, number: signal.Signals
) -> None:
    """SIGTERM goes to all of its processes, as Ctrl-C and Slurm do, and SIGKILL to the main one alone."""
    output = tmp_path / "out"
    sweep, workers = begin(long_spec, output)
    assert len(workers) == 2
    if number == signal.SIGTERM:
        os.killpg(sweep.pid, number)
    else:
        sweep.kill()
    told = sweep.communicate()[1].decode()
    assert sweep.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL), told
    assert "Traceback" not in told
    wait_for_end(workers)
    assert len(list(output.glob("runs/*/summary.json"))) < 3, "it was in the middle"
    run_sweep(options(long_spec, output, THREE))
    assert_equal_to_solo_runs(output, long_spec, THREE)


def test_a_worker_that_is_killed_ends_its_own_runs_alone(tmp_path: Path, grid_spec: Path, children: Children) -> None:
    output, told = tmp_path / "out", list[str]()

    def kill(event: Event) -> None:
        if isinstance(event, Notice) and event.kind == "warning":
            told.append(event.message)
        if isinstance(event, Notice) and event.message.startswith("r=2: step 2: validation"):
            children[0].kill()

    with pytest.raises(
        EnvironmentFault, match=r"^a worker process died \(SIGKILL\): .*r=2: run the same command again"
    ):
        run_sweep(options(grid_spec, output, THREE), kill)
    assert [line.partition(":")[0] for line in told] == ["r=2", "r=3"]
    done = {run.name: (run / "summary.json").is_file() for run in (output / "runs").iterdir()}
    assert done == {"r=2": False, "r=3": False, "r=4": True}
    run_sweep(options(grid_spec, output, THREE))
    assert_equal_to_solo_runs(output, grid_spec, THREE)


def test_a_run_that_was_finished_when_its_worker_died_has_its_summary(
    tmp_path: Path, grid_spec: Path, children: Children
) -> None:
    run_sweep(options(grid_spec, tmp_path / "out", "lora.r=2,4", at_once=1))
    members = plan_members(options(grid_spec, tmp_path / "out", "lora.r=2,4,3,5"))[1]

    def kill(event: Event) -> None:
        children[0].kill()
        children[1].kill()

    found = train_in_workers(members, room_for(members, False), False, lambda name: kill, lambda: False)
    assert [found["r=2"]["steps"], found["r=4"]["steps"]] == [4, 4]
    assert [type(found[name]) for name in ("r=3", "r=5")] == [EnvironmentFault] * 2


def test_faults_of_every_class_come_from_a_worker_unchanged_and_a_warning_once(
    tmp_path: Path, grid_spec: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_processes, "__name__", "broken_worker")
    members = plan_members(options(grid_spec, tmp_path / "out", "lora.r=1,2,3,4,5,6,7"))[1]
    assert len(members) == len(KINDS)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        found = train_in_workers(members, room_for(members, False), False, lambda name: print, lambda: False)
    assert [str(one.message) for one in warned] == ["a library warns", "a class of its own"]
    for rank, fault in enumerate(found.values(), start=1):
        expected = fault_of(rank)
        assert type(fault) is type(expected)
        assert vars(fault) == vars(expected)
        assert str(fault) == str(expected)


class _Warns:
    """A message that warns while it is made ready, as the garbage collector may."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        warnings.warn("on the way", stacklevel=1)
        return dict, ()


class _Stumbles:
    """A connection on which a warning comes in the middle of a message."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._warned = connection, False

    def send_bytes(self, data: bytes) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn("in the middle", stacklevel=1)
        self._connection.send_bytes(data)


def test_a_warning_while_a_message_is_sent_follows_it() -> None:
    ours, theirs = Pipe()
    send = worker_processes._Sender(_Stumbles(theirs))  # type: ignore[arg-type]
    with ours, theirs, worker_processes._warnings_sent(send):
        warnings.simplefilter("always")
        sending = threading.Thread(target=send, args=("first",), daemon=True)
        sending.start()
        sending.join(20)
        assert not sending.is_alive(), "it waits for itself"
        send(_Warns())
        found = [ours.recv() for _ in range(4)]
    assert found[0] == "first"
    assert [one.arguments[0] for one in found[1:3]] == ["in the middle", "on the way"]
    assert found[3] == {}


def test_no_base_is_loaded_before_all_runs_are_planned(
    tmp_path: Path, grid_spec: Path, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run computes at once may depend on the memory that is free."""
    seen: list[str] = []
    planned, send = worker_processes._planned, worker_processes._Worker.send
    monkeypatch.setattr(worker_processes, "_planned", lambda *given: seen.append("planned") or planned(*given))
    monkeypatch.setattr(
        worker_processes._Worker, "send",
        lambda self, message: seen.append(type(message).__name__) or send(self, message),
    )  # fmt: skip
    done = run_sweep(options(grid_spec, tmp_path / "out", "lora.r=2,3,4"))
    assert {run["status"] for run in done.runs} == {"finished"}
    assert seen == ["_Share"] * 2 + ["planned"] * 2 + ["_Load"] * 2 + ["planned"] * 2


@pytest.mark.parametrize(("alpha", "kind", "told"), [(5, RuntimeError, "OfTwo: 1 and 2"), slow(6, OSError, "No space")])
def test_a_bug_in_a_worker_is_raised_with_its_traceback(
    tmp_path: Path, grid_spec: Path, children: Children, monkeypatch: pytest.MonkeyPatch,
    alpha: int, kind: type[Exception], told: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(worker_processes, "__name__", "broken_worker")
    with pytest.raises(kind, match=told) as caught:
        run_sweep(options(grid_spec, tmp_path / "out", "lora.r=1,2,3,4", f"lora.alpha={alpha}"))
    assert 'broken_worker.py", line' in caught.value.__notes__[0]
    assert "in _train_together" in caught.value.__notes__[0]


def test_a_base_for_each_process_must_fit(
    tmp_path: Path, base_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are as many processes as fit beside the runs that are trained at once, and runs as fit with one."""
    monkeypatch.setattr(groups, "usable_cores", lambda: [4, 5, 6])
    members = plan_members(options(base_spec(), tmp_path / "out", *GRID))[1]

    def room(limit: float | None = None, wanted: int | None = None) -> tuple[int, int]:
        spec = base_spec(training__memory_limit="auto" if limit is None else f"{limit / 2**20}MiB")
        found = room_for(plan_members(options(spec, tmp_path / "out", *GRID))[1], False, wanted)
        return found.at_once, found.processes

    whole = room_for(members, False)
    base, own = whole.base_bytes, whole.own_bytes
    assert (whole.at_once, whole.processes, whole.cores) == (4, 3, (4, 5, 6))
    process = base + groups._WORKER_BYTES
    assert room(3.5 * process + 4 * own) == (4, 3)
    assert room(2.5 * process + 4 * own) == (4, 2)
    assert room(1.5 * process + 4 * own) == (4, 1)
    assert room(1.2 * base + 2 * own) == (2, 1)
    assert room(0.1 * base, wanted=4) == (4, 1)
    assert room(wanted=2) == (2, 2)
    told = replace(whole, base_bytes=2 << 30, own_bytes=1 << 30, limit_bytes=None)
    assert told.told(4) == "together in 3 processes (about 10.47 GiB)"
    assert told.told(2) == "together in 2 processes (about 6.31 GiB)"
    assert replace(told, processes=1).told(4) == "together on one base (about 6.00 GiB)"


@pytest.mark.parametrize("cores", [[5], []])
def test_where_one_core_or_none_is_known_runs_are_trained_in_this_process(
    tmp_path: Path, base_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cores: list[int]
) -> None:
    monkeypatch.setattr(groups, "usable_cores", lambda: cores)
    members = plan_members(options(base_spec(), tmp_path / "out", *GRID))[1]
    assert room_for(members, False).processes == 1


def test_one_run_at_once_starts_no_process(tmp_path: Path, grid_spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "usable_cores", lambda: [0, 0])
    monkeypatch.setattr(sweep_module, "train_in_workers", None)
    run_sweep(options(grid_spec, tmp_path / "out", "lora.r=2,4", at_once=1))
    assert len(metrics(tmp_path / "out/runs/r=4", "step")) == 4
