"""Worker processes: how one that died is told of, and faults that cross a pipe."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import llamatune
from llamatune import errors
from llamatune.child_process import death_of, end_child, start_child
from llamatune.data.jinja_process import JinjaProcess
from llamatune.errors import EnvironmentFault, FailedElsewhere, LlamatuneError
from llamatune.formats.manifest import OtherVersion
from llamatune.stop_signals import STOP_SIGNALS

FAULTS = [
    kind("what\nis wrong", Path("some") / "where", "do that")
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, LlamatuneError) and kind is not FailedElsewhere
]


@pytest.mark.parametrize(
    "fault", [*FAULTS, FailedElsewhere(4), OtherVersion(3, Path("x")), EnvironmentFault("w" * 3000)], ids=repr
)
def test_a_fault_of_every_class_crosses_a_pipe_unchanged(fault: LlamatuneError) -> None:
    found = pickle.loads(pickle.dumps(fault))
    assert type(found) is type(fault)
    for name in ("what", "where", "todo", "exit_code", "args"):
        assert getattr(found, name) == getattr(fault, name), name
    assert str(found) == str(fault)


def test_every_class_of_faults_is_among_these() -> None:
    """A class with a constructor of its own is pickled by the state, so one of them stands for all."""
    for module in pkgutil.walk_packages(llamatune.__path__, "llamatune."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    left, found = [LlamatuneError], set[type[LlamatuneError]]()
    while left:
        found.add(kind := left.pop())
        left += kind.__subclasses__()
    assert {kind.__reduce__ for kind in found} == {LlamatuneError.__reduce__}
    assert {kind for kind in found if "__init__" in vars(kind)} <= {LlamatuneError, FailedElsewhere, OtherVersion}


@pytest.mark.parametrize(
    ("code", "told"),
    [("import os; os.kill(os.getpid(), 9)", r"a worker process died \(SIGKILL\): try again"),
     ("raise SystemExit(3)", r"a worker process died \(exit status 3\): try again")],
)  # fmt: skip
def test_what_ended_a_worker_is_named(code: str, told: str) -> None:
    with subprocess.Popen([sys.executable, "-c", code]) as child, pytest.raises(EnvironmentFault, match=told):
        raise death_of(child, "try again")


def test_a_child_gets_no_stop_signal_and_ends_with_its_pipe() -> None:
    child, connection = start_child("llamatune.data.jinja_engine", silent=True)
    child.send_signal(signal.SIGTERM)
    connection.send_bytes(b'["{{ 1 + 1 }}", {}, null]')
    assert connection.poll(60)
    assert b"refused" not in connection.recv_bytes()
    end_child(child, connection)
    assert child.returncode == -signal.SIGKILL


def test_a_child_of_a_child_is_started_as_well() -> None:
    """A worker has the stop signals blocked, and may render a template in a process with limits."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        assert "refused" not in JinjaProcess("{{ 1 + 1 }}", {}, None).reply({"messages": []})
        assert set(STOP_SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
