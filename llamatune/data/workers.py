"""Worker processes that encode batches of rows on several cores, in order, with bounded memory.

Each worker is a new Python process with one pipe and encodes one batch at a time: batch k goes to worker k mod n and
results are received in that order, so the output does not depend on the number of workers. A worker ends when its
pipe closes, also when the main process is killed.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from multiprocessing.connection import Connection

from llamatune.child_process import death_of, end_child, start_child
from llamatune.data.encoding import EncodedBatch, Recipe, encode_batch
from llamatune.data.raw_row import RawRow
from llamatune.errors import EnvironmentFault, LlamatuneError
from llamatune.processor import core_count

_POLL_S = 0.2
_BYTES_FOR_A_WORKER = 4 << 20  # starting a process costs about as much as encoding 1 MB


def default_workers(total_bytes: int) -> int:
    """One for each 4 MiB of rows, at most one a core."""
    return min(core_count(), total_bytes // _BYTES_FOR_A_WORKER)


def encode_batches(
    recipe: Recipe, batches: Iterable[Sequence[RawRow]], workers: int, check_stop: Callable[[], None]
) -> Generator[EncodedBatch, None, None]:
    """Each batch encoded, in order; ``workers`` below 2 means in this process. ``check_stop`` raises to stop.

    ``EnvironmentFault`` if a worker could not start, or died.
    """
    if workers < 2:
        for batch in batches:
            check_stop()
            yield encode_batch(recipe, batch)
        return
    with contextlib.ExitStack() as stack:
        pool = [stack.enter_context(contextlib.closing(_Worker())) for _ in range(workers)]
        for worker in pool:
            worker.send(recipe)
        idle, busy = deque(pool), deque[_Worker]()
        for batch in batches:
            encoded = None
            if not idle:
                idle.append(busy.popleft())
                encoded = idle[-1].result(check_stop)
            busy.append(idle.popleft())
            busy[-1].send(batch)  # before the result is used, so that the worker does not wait for that
            if encoded is not None:
                yield encoded
        for worker in busy:
            yield worker.result(check_stop)


def serve(descriptor: int) -> None:
    """The main function of a worker: receive a recipe, then encode batches until the pipe closes."""
    connection = Connection(descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        recipe: Recipe = connection.recv()
        while True:
            rows = connection.recv()
            try:
                connection.send(encode_batch(recipe, rows))
            except LlamatuneError as fault:
                connection.send(fault)


class _Worker:
    def __init__(self) -> None:
        self._child, self._connection = start_child(__name__)

    def close(self) -> None:
        end_child(self._child, self._connection)

    def send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise self._died() from None

    def result(self, check_stop: Callable[[], None]) -> EncodedBatch:
        try:
            while not self._connection.poll(_POLL_S):
                check_stop()
            check_stop()
            batch: EncodedBatch | LlamatuneError = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(batch, LlamatuneError):
            raise batch
        return batch

    def _died(self) -> EnvironmentFault:
        return death_of(self._child, "is there memory left?")
