"""Encoding batches of rows on several cores, in order, with bounded memory.

Each worker is a fresh Python process with one pipe to us, and has one batch at a time: batch k goes to worker
k mod n and is fetched in turn, so the result does not depend on how many workers there are. A worker ends when its
pipe closes, whatever becomes of us.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from multiprocessing.connection import Connection

from llamatune.data.encoding import EncodedBatch, Recipe, encode_batch
from llamatune.data.rows import RawRow
from llamatune.errors import EnvironmentFault, Stopped
from llamatune.events import ShouldStop

_POLL_S = 0.2
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SERVE = "import sys; sys.path[:] = {path!r}; from llamatune.data.workers import serve; serve({descriptor})"


def encode_batches(
    recipe: Recipe, batches: Iterable[Sequence[RawRow]], workers: int, should_stop: ShouldStop
) -> Generator[EncodedBatch, None, None]:
    """Each batch encoded, in order; ``workers`` below 2 means in this process.

    Raises:
        Stopped: ``should_stop`` said so between two batches.
        EnvironmentFault: a worker could not start, or died.
    """
    if workers < 2:
        for batch in batches:
            _check(should_stop)
            yield encode_batch(recipe, batch)
        return
    with contextlib.ExitStack() as stack:
        pool = [stack.enter_context(_Worker()) for _ in range(workers)]
        for worker in pool:
            worker.send(recipe)
        idle, busy = deque(pool), deque[_Worker]()
        for batch in batches:
            if not idle:
                idle.append(busy.popleft())
                yield idle[-1].result(should_stop)
            busy.append(idle.popleft())
            busy[-1].send(batch)
        for worker in busy:
            yield worker.result(should_stop)


def serve(descriptor: int) -> None:
    """A worker's life: a recipe, then batches, until the pipe closes."""
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        recipe: Recipe = connection.recv()
        while True:
            connection.send(encode_batch(recipe, connection.recv()))


class _Worker:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            code = _SERVE.format(path=[entry or os.getcwd() for entry in sys.path], descriptor=descriptor)
            # Slurm and terminals signal every process at once, but the answer is ours: it closes the pipe. A blocked
            # signal stays blocked in a child from its first instruction on; ours come through when it is started.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
            try:
                self._child = subprocess.Popen(
                    [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=(descriptor,)
                )
            except OSError as fault:
                ours.close()
                raise EnvironmentFault(f"cannot start a worker process: {fault.strerror}") from None
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        self._connection = Connection(ours.detach())

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._child.kill()  # it holds nothing that could be lost
        self._child.wait()

    def send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise self._died() from None

    def result(self, should_stop: ShouldStop) -> EncodedBatch:
        try:
            while not self._connection.poll(_POLL_S):
                _check(should_stop)
            _check(should_stop)
            batch: EncodedBatch = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        return batch

    def _died(self) -> EnvironmentFault:
        try:
            code = self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        return EnvironmentFault(f"a worker process died (exit status {code})", None, "is there memory left?")


def _check(should_stop: ShouldStop) -> None:
    if should_stop():
        raise Stopped("stopped before the rows were prepared", None, "run the same command again")
