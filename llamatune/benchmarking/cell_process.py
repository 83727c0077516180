"""A cell in a process of its own: what the benchmark asks of it, and what may become of it.

``python -m llamatune.benchmarking.cell_process RESULT.json`` reads its task from stdin.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamatune.errors import LlamatuneError, OutOfMemory, Stopped
from llamatune.events import ShouldStop, ignore_event
from llamatune.files import dump_json, parse_json, read_json, write_atomic
from llamatune.spec import build_spec
from llamatune.strict_yaml import parse_yaml

if TYPE_CHECKING:
    from llamatune.benchmarking.measure_cell import Task

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = 0.1
SCRATCH = ".llamatune-cell-"
"""What the names of cells' temporary directories begin with."""


def run_cell(task: Task, directory: Path, should_stop: ShouldStop) -> dict[str, Any]:
    """Measure ``task`` in a child process that has a temporary directory inside ``directory``.

    Returns what it measured, or why not, by ``status``: measured, oom, refused (nothing was begun), failed (with
    ``reason`` and ``exit_code``), or killed (by SIGKILL, as a host does that has no memory left).

    Raises:
        Stopped: ``should_stop`` said so; the child is gone.
    """
    request = {
        "spec": task.spec.to_yaml(),
        "steps": task.steps,
        "seeds": task.seeds,
        "memory_limit_bytes": task.memory_limit_bytes,
    }
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=directory) as scratch:
        result, errors = Path(scratch) / "result.json", Path(scratch) / "stderr"
        with errors.open("wb") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", "llamatune.benchmarking.cell_process", str(result)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "TMPDIR": scratch},
            )
            try:
                _ask(child, json.dumps(request).encode(), should_stop)
            finally:
                child.kill()
                child.wait()
        if child.returncode == 0:
            return read_json(result)
        if child.returncode == -signal.SIGKILL:
            return {"status": "killed", "reason": "killed (SIGKILL); the host may have had no memory left"}
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
        return {"status": "failed", "reason": lines[-1], "exit_code": child.returncode}


def _ask(child: subprocess.Popen[bytes], request: bytes, should_stop: ShouldStop) -> None:
    """Hand over the request and wait for the child's end."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:
        child.stdin.write(request)
    while not should_stop():
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_POLL_S)
            return
    raise Stopped("stopped by a signal")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked, in this process; every fault that has a name is an answer too."""
    from llamatune.benchmarking.measure_cell import Task, measure
    from llamatune.training.setup import open_inputs

    task = Task(
        build_spec(parse_yaml(request["spec"], "the cell's spec"), "the cell's spec"),
        request["steps"],
        tuple(request["seeds"]),
        request["memory_limit_bytes"],
    )
    try:
        inputs = open_inputs(task.spec, False, ignore_event)
    except LlamatuneError as fault:
        return {"status": "refused", "reason": str(fault), "exit_code": fault.exit_code}
    try:
        return {"status": "measured", **measure(task, inputs)}
    except OutOfMemory as fault:
        return {"status": "oom", "reason": str(fault), "exit_code": fault.exit_code}
    except LlamatuneError as fault:
        return {"status": "failed", "reason": str(fault), "exit_code": fault.exit_code}


def main() -> None:
    """The child's life; it ends with the benchmark, which alone listens to signals."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
    write_atomic(Path(sys.argv[1]), dump_json(answer(parse_json(sys.stdin.buffer.read()))))


if __name__ == "__main__":
    main()
