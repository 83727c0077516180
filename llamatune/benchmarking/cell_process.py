"""Runs one benchmark cell in a process of its own, and returns its result or why there is none.

``python -m llamatune.benchmarking.cell_process RESULT.json`` is that process; it reads its task from stdin.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from llamatune.durable_writing import write_atomic
from llamatune.errors import LlamatuneError, OutOfMemory, Stopped
from llamatune.events import ShouldStop, ignore_event
from llamatune.stop_signals import STOP_SIGNALS
from llamatune.strict_json import dump_json, parse_json, read_json

_POLL_S = 0.1
SCRATCH = ".llamatune-cell-"
"""Prefix of the cells' temporary directories."""


class CellTask(Protocol):
    """What a cell measures; ``request``: as JSON, with its ``kind``."""

    def request(self) -> dict[str, Any]: ...


def run_cell(task: CellTask, directory: Path, should_stop: ShouldStop) -> dict[str, Any]:
    """Measure ``task`` in a child process, with a temporary directory inside ``directory``.

    The result has a ``status``: measured, oom, refused (its inputs cannot be opened), failed (with ``reason`` and
    ``exit_code``), or killed (by SIGKILL, as a host without free memory does).

    Raises:
        Stopped: ``should_stop`` returned True; the child has ended.
    """
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
                    child.stdin.write(json.dumps(task.request()).encode())
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
    opened = {"steps": _open_steps, "generation": _open_generation}[request["kind"]]
    try:
        measure = opened(request)
    except LlamatuneError as fault:
        return {"status": "refused", "reason": str(fault), "exit_code": fault.exit_code}
    try:
        return {"status": "measured", **measure()}
    except OutOfMemory as fault:
        return {"status": "oom", "reason": str(fault), "exit_code": fault.exit_code}
    except LlamatuneError as fault:
        return {"status": "failed", "reason": str(fault), "exit_code": fault.exit_code}


def _open_steps(request: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    from llamatune.benchmarking.measure_cell import Task, measure
    from llamatune.training.inputs import open_inputs

    task = Task.of_request(request)
    return functools.partial(measure, task, open_inputs(task.spec, False, ignore_event))


def _open_generation(request: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    from llamatune.benchmarking.measure_generation import GenerationTask, measure_generation
    from llamatune.inference.model_source import open_model

    task = GenerationTask.of_request(request)
    return functools.partial(measure_generation, task, open_model(task.source))


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
