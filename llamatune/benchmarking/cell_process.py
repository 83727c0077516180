"""Runs one benchmark cell in a process of its own, and returns its result or why there is none.

``python -m llamatune.benchmarking.cell_process RESULT.json`` is that process; it reads its task from stdin.
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

from llamatune.durable_writing import write_atomic
from llamatune.errors import LlamatuneError, OutOfMemory, Stopped
from llamatune.events import ShouldStop, ignore_event
from llamatune.spec import build_spec
from llamatune.stop_signals import STOP_SIGNALS
from llamatune.strict_json import dump_json, parse_json, read_json
from llamatune.strict_yaml import parse_yaml

if TYPE_CHECKING:
    from llamatune.benchmarking.measure_cell import Task

_POLL_S = 0.1
SCRATCH = ".llamatune-cell-"
"""Prefix of the cells' temporary directories."""


def run_cell(task: Task, directory: Path, should_stop: ShouldStop) -> dict[str, Any]:
    """Measure ``task`` in a child process, with a temporary directory inside ``directory``.

    The result has a ``status``: measured, oom, refused (its inputs cannot be opened), failed (with ``reason`` and
    ``exit_code``), or killed (by SIGKILL, as a host without free memory does).

    Raises:
        Stopped: ``should_stop`` returned True; the child has ended.
    """
    request = {**vars(task), "spec": task.spec.to_yaml()}
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
                assert child.stdin is not None
                with contextlib.suppress(BrokenPipeError), child.stdin:
                    child.stdin.write(json.dumps(request).encode())
                while not should_stop():
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(_POLL_S)
                        break
                else:
                    raise Stopped("stopped by a signal")
            finally:
                child.kill()
                child.wait()
        if child.returncode == 0:
            return read_json(result)
        if child.returncode == -signal.SIGKILL:
            return {"status": "killed", "reason": "killed (SIGKILL); the host may have had no memory left"}
        lines = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
        return {"status": "failed", "reason": lines[-1], "exit_code": child.returncode}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Measure the cell of ``request`` in this process; a ``LlamatuneError`` becomes a result, too."""
    from llamatune.benchmarking.measure_cell import Task, measure
    from llamatune.training.inputs import open_inputs

    spec = build_spec(parse_yaml(request["spec"], "the cell's spec"), "the cell's spec")
    task = Task(**{**request, "spec": spec, "seeds": tuple(request["seeds"])})
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
    """The child process. It ignores signals, which the benchmark handles, and is killed when the benchmark ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
    write_atomic(Path(sys.argv[1]), dump_json(answer(parse_json(sys.stdin.buffer.read()))))


if __name__ == "__main__":
    main()
