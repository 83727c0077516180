"""Where the ranks of a launch meet: a store of keys that rank 0, or torchrun, holds."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from llamatune.errors import EnvironmentFault, FailedElsewhere, Stopped
from llamatune.launch_variables import Launch

T = TypeVar("T")

FAILED = "failed"
"""The key of the rank that failed first, with its exit code."""
LEFT = "left"
"""The key of how many ranks need the store no more."""
_MET = "met"
_POLL_S = 0.05
_LOOK_S = 0.2


def aside(work: Callable[[], T], look: Callable[[], None]) -> T:
    """What ``work`` returns or raises. It runs in a thread, since torch handles no signal while it waits for others.

    Meanwhile ``look``, called every 0.2 s, may raise what ends the wait.
    """
    results: list[T] = []
    faults: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as fault:
            faults.append(fault)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    looked = time.monotonic()
    while thread.is_alive():
        thread.join(_POLL_S)
        if time.monotonic() - looked > _LOOK_S:
            looked = time.monotonic()
            look()
    if faults:
        raise faults[0]
    return results[0]


def within(seconds: float, work: Callable[[], T], look: Callable[[], None] = lambda: None) -> T:
    """What ``work`` returns or raises, ``look`` as in ``aside``.

    Raises:
        RuntimeError: it takes longer: a rank is stopped, perhaps rank 0, whose process holds the store. torch waits on.
    """
    deadline = time.monotonic() + seconds

    def look_at_the_time() -> None:
        look()
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer within {seconds:g} s")

    return aside(work, look_at_the_time)


def failure(store: Store) -> tuple[int, int]:
    """The rank that failed first, and its exit code."""
    rank, code = store.get(FAILED).split()
    return int(rank), int(code)


def refuse_after_failure(store: Store) -> None:
    """Raise ``FailedElsewhere`` if a rank has failed."""
    if store.check([FAILED]):
        raise FailedElsewhere(failure(store)[1])


def report_stop(launch: Launch, seconds: float) -> bool | None:
    """Tell the others that this rank was stopped before it met them; whether it is the first that tells of its end.

    The others leave with it instead of waiting for it. None: the store cannot be reached in so many seconds. Rank 0
    holds it open so long for them.
    """

    def tell() -> bool:
        store, deadline = open_store(launch, seconds, lambda: None), time.monotonic() + seconds
        mine = f"{launch.rank} {Stopped.exit_code}".encode()
        first = store.compare_set(FAILED, "", mine.decode()) == mine
        left = store.add(LEFT, 1)
        while launch.rank == 0 and left < launch.world_size and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            left = store.add(LEFT, 0)
        return first

    with contextlib.suppress(EnvironmentFault, FailedElsewhere, RuntimeError):
        return within(3 * seconds, tell)  # to connect, to be answered, to hold it open
    return None


def open_store(launch: Launch, timeout_s: float, look: Callable[[], None], begin: bool = True) -> Store:
    """A connection to the store, which rank 0 begins unless torchrun did. ``look`` as in ``aside``.

    Raises:
        EnvironmentFault: the port is in use, or there is no rank 0 within the timeout.
        FailedElsewhere: this rank was stopped, and without the store only rank 0 may say so.
    """
    where = _where(launch)
    begins = begin and launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    timeout = timedelta(seconds=timeout_s)

    def connect() -> TCPStore:
        socket.getaddrinfo(launch.address, launch.port)  # torch asks on and on for a name that does not exist
        return TCPStore(launch.address, launch.port, None, begins, timeout, wait_for_workers=False)

    try:
        tcp = aside(connect, look)
    except socket.gaierror as fault:
        if launch.rank > 1:
            raise FailedElsewhere(EnvironmentFault.exit_code) from fault
        what = f"rank {launch.rank} of {launch.world_size}: {fault.strerror}"
        raise EnvironmentFault(what, where, "set MASTER_ADDR to the address of rank 0") from fault
    except RuntimeError as fault:
        if "EADDRINUSE" in str(fault) or "address already in use" in str(fault).lower():
            raise EnvironmentFault("the port is in use", where, "set MASTER_PORT to a free one") from fault
        if launch.rank > 1:
            raise FailedElsewhere(EnvironmentFault.exit_code) from fault
        raise EnvironmentFault(
            f"rank {launch.rank} of {launch.world_size} found no rank 0 within {timeout_s:g} s",
            where,
            "see whether rank 0 started; MASTER_ADDR and MASTER_PORT choose another address",
        ) from fault
    except BaseException as fault:
        if launch.rank > 0 and getattr(fault, "exit_code", None) == Stopped.exit_code:
            raise FailedElsewhere(Stopped.exit_code) from fault
        raise
    return PrefixStore(f"llamatune-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)


def meet(store: Store, launch: Launch, timeout_s: float, look: Callable[[], None]) -> None:
    """Return when every rank is there, with one world size and a number of its own. ``look`` as in ``aside``.

    Raises:
        EnvironmentFault: they are not there within the timeout, or contradict each other.
        FailedElsewhere: another rank failed, or rank 0 reports who is missing.
    """
    rank, size, where = launch.rank, launch.world_size, _where(launch)
    mend = "start one job on one port: set MASTER_PORT for the other"
    keys = [f"size-{number}" for number in range(size)]
    deadline = time.monotonic() + timeout_s
    try:
        if store.add(f"rank-{rank}", 1) > 1:
            raise EnvironmentFault(f"two processes were started as rank {rank} of {size}", where, mend)
        store.set(keys[rank], str(size))
        while not store.check(keys if rank == 0 else [_MET]):
            look()
            if time.monotonic() > deadline:
                raise _absent(store, launch, timeout_s) if rank == 0 else FailedElsewhere(EnvironmentFault.exit_code)
            time.sleep(_LOOK_S)
        sizes = {int(store.get(key)) for key in (keys if rank == 0 else keys[:1])} | {size}
    except RuntimeError as fault:
        if rank > 1:
            raise FailedElsewhere(EnvironmentFault.exit_code) from fault
        raise EnvironmentFault(
            f"rank {rank} of {size}: rank 0 ended before all had started", where, "see its log"
        ) from fault
    if len(sizes) > 1:
        what = f"the ranks were started as parts of {' and of '.join(map(str, sorted(sizes)))}"
        raise EnvironmentFault(what, where, mend)
    if rank == 0:
        store.set(_MET, "1")


def _absent(store: Store, launch: Launch, timeout_s: float) -> EnvironmentFault:
    absent = [str(rank) for rank in range(launch.world_size) if not store.check([f"size-{rank}"])]
    missing = ", ".join(absent[:8]) + (" ..." if len(absent) > 8 else "")
    what = f"rank {missing} of {launch.world_size} did not start within {timeout_s:g} s"
    return EnvironmentFault(what, _where(launch), "see its node's log")


def _where(launch: Launch) -> str:
    address = f"[{launch.address}]" if ":" in launch.address else launch.address
    return f"{address}:{launch.port}"


@contextlib.contextmanager
def without_gloos_log() -> Iterator[None]:
    """Keep off stderr what gloo writes there while it connects; it has no level. Other lines come after."""
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if b"/gloo/" not in line:
                    os.write(2, line)
