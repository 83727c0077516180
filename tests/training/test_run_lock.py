"""A run directory has one owner, with the kernel's locks and without them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llamatune.errors import EnvironmentFault
from llamatune.training import run_lock as room
from llamatune.training.run_lock import LOCK, run_lock


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks to give, and short waits."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(room, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(room, "SILENCE_S", 1.0)
    monkeypatch.setattr(room, "SETTLING_S", 0.1)


def own(path: Path, **note: Any) -> None:
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "2026-01-01T00:00:00+0000", **note}))


def test_the_second_of_two_processes_is_told_who_the_first_is(tmp_path: Path) -> None:
    holder = "import sys,pathlib\nfrom llamatune.training.run_lock import run_lock\n"
    holder += "with run_lock(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    first = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert first.stdout is not None
    assert first.stdout.readline() == b"held\n"
    with (
        pytest.raises(EnvironmentFault, match=rf"in use by process {first.pid} on .+ since \d{{4}}-"),
        run_lock(tmp_path),
    ):
        pass
    first.kill()  # a lock dies with its process
    first.wait()
    with run_lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] != first.pid
    assert (tmp_path / LOCK).read_text() == ""


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_silent_owner_on_another_host_is_dead(tmp_path: Path) -> None:
    own(tmp_path / LOCK)
    with run_lock(tmp_path):
        first = json.loads((tmp_path / LOCK).read_text())
        time.sleep(0.3)
        assert json.loads((tmp_path / LOCK).read_text())["beat"] > first["beat"]
    assert (tmp_path / LOCK).read_text() == ""


@pytest.mark.usefixtures("no_locks")
def test_without_locks_an_owner_whose_note_changes_is_alive(tmp_path: Path) -> None:
    own(tmp_path / LOCK, beat=0)
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(0.05):
            number += 1
            with contextlib.suppress(OSError):
                own(tmp_path / LOCK, beat=number)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(EnvironmentFault, match="in use by process 1 on elsewhere"), run_lock(tmp_path):
            pass
    finally:
        ended.set()
        thread.join()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_one_of_two_simultaneous_claims_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def somebody_else(seconds: float) -> None:
        own(tmp_path / LOCK, claim="another")

    monkeypatch.setattr(room.time, "sleep", somebody_else)
    with pytest.raises(EnvironmentFault, match="in use by process 1 on elsewhere"), run_lock(tmp_path):
        pass
    assert json.loads((tmp_path / LOCK).read_text())["claim"] == "another"


@pytest.mark.usefixtures("no_locks")
def test_without_locks_an_owner_on_this_host_is_looked_up(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    own(tmp_path / LOCK, host=room.socket.gethostname(), pid=dead.pid)
    with run_lock(tmp_path), pytest.raises(EnvironmentFault, match="in use by process"), run_lock(tmp_path):
        pass
