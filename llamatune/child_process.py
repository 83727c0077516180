"""A Python child process with one pipe, which the parent's stop signals do not reach; its end and its death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe

from llamatune.errors import EnvironmentFault
from llamatune.stop_signals import STOP_SIGNALS

_SERVE = "import sys; sys.path[:] = {path!r}; from {module} import serve; serve({descriptor})"


def start_child(
    module: str, *, silent: bool = False, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """A new process that runs ``serve`` of ``module`` with the descriptor of its end of the pipe; and our end.

    ``silent``: what it writes to stderr is dropped. ``environment`` None is that of this process.
    ``EnvironmentFault`` if it cannot be started.
    """
    ours, theirs = Pipe()
    with theirs:
        descriptor = theirs.fileno()
        path = [entry or os.getcwd() for entry in sys.path]
        code = _SERVE.format(path=path, module=module, descriptor=descriptor)
        # Slurm and terminals signal every process, but children must wait for the main process to close the pipe. A
        # signal that is blocked here stays blocked in the child; afterwards the main process receives it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL if silent else None,
                pass_fds=(descriptor,),
                env=environment,
            )
        except OSError as fault:
            ours.close()
            raise EnvironmentFault(f"cannot start a worker process: {fault.strerror}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return child, ours


def death_of(child: subprocess.Popen[bytes], todo: str, where: object = None) -> EnvironmentFault:
    """The fault of a worker that has closed its pipe without being asked: the signal or the status, and what to do.

    One that goes on for five seconds nevertheless is killed.
    """
    try:
        code = child.wait(timeout=5)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return EnvironmentFault("a worker process closed its pipe", where, todo)
    how = signal.Signals(-code).name if -code in signal.valid_signals() else f"exit status {code}"
    return EnvironmentFault(f"a worker process died ({how})", where, todo)


def end_child(child: subprocess.Popen[bytes], connection: Connection) -> None:
    """Close the pipe, and end a process that has nothing to save."""
    connection.close()
    child.kill()
    child.wait()
