"""Runs of the command line in processes of their own, without the seconds that importing torch takes.

A parent that has imported everything forks a child for each run. The child can be traced (it stops itself until strace
has attached, and what strace sees is what the kernel sees) or killed after a while. Nothing of a run is left in the
parent: each starts from the same memory, and several may run at once, as ranks do. ``Warm`` is the client, this file
run as a script the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NO_STRACE = "strace is not here, or may not trace: apt-get install strace"
_LONGEST_RUN_S = 120


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (negative: the signal that killed it), what it said, and how long it took."""

    code: int
    stdout: str
    stderr: str
    wall_s: float


def strace() -> str | None:
    """Where strace is, if it is there and may trace here; None otherwise."""
    found = shutil.which("strace")
    if found is None:
        return None
    tried = subprocess.run([found, "-qq", "-e", "trace=none", "true"], capture_output=True)
    return found if tried.returncode == 0 else None


@dataclass(frozen=True)
class Running:
    """A run that has begun. Its number is not given to another process before ``Warm.finish``."""

    pid: int
    began_s: float

    def ended_within(self, seconds: float) -> bool:
        watched = os.pidfd_open(self.pid)
        try:
            return bool(select.select([watched], [], [], seconds)[0])
        finally:
            os.close(watched)


class Warm:
    """The client of one parent. To load what is loaded lazily, it runs ``first`` itself and imports ``modules``."""

    def __init__(self, first: list[list[str]], scratch: Path, modules: tuple[str, ...] = ()) -> None:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TORCH_CPP_LOG_LEVEL": "FATAL",
        }  # fmt: skip
        self._errors = (scratch / "warm-parent.log").open("w+")
        self._parent = subprocess.Popen(
            [sys.executable, __file__, json.dumps(first), *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment, cwd=scratch,
        )  # fmt: skip

    def run(self, arguments: list[str], *, kill_after_s: float | None = None, **how: Any) -> Ended:
        """One run, ``how`` as ``start`` takes it; SIGKILL comes after ``kill_after_s``, unless it has ended by then."""
        running = self.start(arguments, **how)
        if not running.ended_within(_LONGEST_RUN_S if kill_after_s is None else kill_after_s):
            os.kill(running.pid, signal.SIGKILL)
        return self.finish(running)

    def start(
        self,
        arguments: list[str],
        *,
        tracing: list[str] | None = None,
        log: Path | None = None,
        loss_scale: float | None = None,
        broken: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> Running:
        """Begin a run, which ``finish`` must end.

        Args:
            tracing: options of strace; its log goes to ``log``.
            loss_scale: where fp16's loss scale begins, so high that it overflows.
            broken: a function of ``broken.py`` that spoils the writer, or of another module here (``module.function``).
            environment: variables beside those of this process.
        """
        task = {"arguments": arguments, "tracing": tracing, "log": str(log), "loss_scale": loss_scale,
                "broken": broken, "environment": environment or {}}  # fmt: skip
        began_s = time.monotonic()
        return Running(self._ask(task)["pid"], began_s)

    def finish(self, running: Running) -> Ended:
        """Wait for its end."""
        assert running.ended_within(_LONGEST_RUN_S), "a run that does not end"
        wall_s = time.monotonic() - running.began_s
        return Ended(**self._ask({"finish": running.pid}), wall_s=wall_s)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        answer = self._parent.stdout.readline()
        if not answer:
            self._errors.seek(0)
            raise AssertionError(f"the parent of the runs died: {self._errors.read()}")
        return dict(json.loads(answer))

    def close(self) -> None:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait(timeout=60)
        self._parent.stdout.close()
        self._errors.close()


def _child(task: dict[str, Any], output: int, errors: int) -> int:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.environ.update(task["environment"])
    if task["loss_scale"] is not None:
        from llamatune.training import model_and_optimizer
        from llamatune.training.precision import LossScaler

        model_and_optimizer.LossScaler = lambda enabled: LossScaler(enabled, task["loss_scale"], 3)
    if task["broken"] is not None:
        module, _, function = task["broken"].rpartition(".")
        getattr(importlib.import_module(module or "broken"), function)()
    if task["tracing"] is not None:
        any_process = ctypes.c_ulong(-1)  # PR_SET_PTRACER: where only ancestors may trace, let strace do it
        ctypes.CDLL(None).prctl(0x59616D61, any_process, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
    return _main(task["arguments"])


def _main(arguments: list[str]) -> int:
    from llamatune.cli import main

    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    raise AssertionError("main always exits")


def _attach(pid: int, options: list[str], log: str) -> subprocess.Popen[bytes]:
    """strace on the stopped child; back when it has begun and the child runs."""
    os.waitpid(pid, os.WUNTRACED)
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", log, *options, "-p", str(pid)], stdin=subprocess.DEVNULL)
    while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
        assert tracer.poll() is None, "strace could not attach"
        time.sleep(0.001)
    os.kill(pid, signal.SIGCONT)
    return tracer


@dataclass(frozen=True)
class _Child:
    """A run of the parent: memory files with what it says, and its tracer."""

    output: int
    errors: int
    tracer: subprocess.Popen[bytes] | None


def _start(task: dict[str, Any]) -> tuple[int, _Child]:
    output, errors = (os.memfd_create(name) for name in ("stdout", "stderr"))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _child(task, output, errors)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return pid, _Child(output, errors, _attach(pid, task["tracing"], task["log"]) if task["tracing"] else None)


def _finish(pid: int, child: _Child) -> dict[str, Any]:
    _, status = os.waitpid(pid, 0)
    if child.tracer is not None:
        child.tracer.wait(timeout=60)
    said = []
    for descriptor in (child.output, child.errors):
        os.lseek(descriptor, 0, os.SEEK_SET)
        with os.fdopen(descriptor, "rb") as file:
            said.append(file.read().decode(errors="replace"))
    return {"code": os.waitstatus_to_exitcode(status), "stdout": said[0], "stderr": said[1]}


def _serve(first: list[list[str]], modules: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for arguments in first:
        code = _main(arguments)
        assert code == 0, arguments
    for module in modules:
        importlib.import_module(module)
    children: dict[int, _Child] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "finish" in request:
            answer = _finish(request["finish"], children.pop(request["finish"]))
        else:
            pid, child = _start(request)
            children[pid], answer = child, {"pid": pid}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]), sys.argv[2:])
