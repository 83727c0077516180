"""The lock of a run directory: flock, or a heartbeat in the lock file where the file system has no locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from llamatune.durable_writing import disk_faults
from llamatune.errors import EnvironmentFault
from llamatune.formats.lock_note import LARGEST_NOTE, LockNote, parse_note
from llamatune.safe_reading import open_own

LOCK = ".llamatune.lock"
"""The first file that a run makes; it names the process that holds the lock."""

HEARTBEAT_S, SILENCE_S, SETTLING_S = 10.0, 35.0, 2.0
"""Without flock: seconds between an owner's heartbeats; seconds to wait for one before an owner counts as dead; seconds
that a new owner waits to see whether another process claimed the directory at the same time."""

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of ``directory``; ``EnvironmentFault`` with host, id and start time of a process that holds it."""
    with contextlib.ExitStack() as stack:
        with disk_faults(directory / LOCK):
            descriptor = open_own(directory / LOCK, os.O_RDWR)
            stack.callback(os.close, descriptor)
            keeping = _claim(descriptor, directory)
        try:
            with keeping:
                yield
        finally:
            with contextlib.suppress(OSError):  # a note left behind does no harm
                os.ftruncate(descriptor, 0)


def _claim(descriptor: int, directory: Path) -> contextlib.AbstractContextManager[None]:
    """Take the lock; the context returned keeps it."""
    note = LockNote(host=socket.gethostname(), pid=os.getpid(), started=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(_read(descriptor), directory) from None
    except OSError as fault:  # a network file system without locks
        if fault.errno not in _NO_LOCKS:
            raise
        return _heartbeat(descriptor, note, directory)
    _write(descriptor, note)
    return contextlib.nullcontext()


def _heartbeat(descriptor: int, note: LockNote, directory: Path) -> contextlib.AbstractContextManager[None]:
    """Claim by a note that its writer changes every few seconds. No clocks or file times are compared."""
    owner = _read(descriptor)
    if owner is not None and _is_alive(descriptor, owner, note.host):
        raise _in_use(owner, directory)
    claim = note.model_copy(update={"claim": os.urandom(8).hex(), "beat": 0})
    _write(descriptor, claim)
    time.sleep(SETTLING_S)
    last = _read(descriptor)
    if last is not None and last.claim != claim.claim:
        raise _in_use(last, directory)
    return _beating(descriptor, claim)


@contextlib.contextmanager
def _beating(descriptor: int, claim: LockNote) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        for number in itertools.count(1):
            if ended.wait(HEARTBEAT_S):
                return
            with contextlib.suppress(OSError):  # the server may be away for a moment; the next beat tries again
                _write(descriptor, claim.model_copy(update={"beat": number}))

    thread = threading.Thread(target=beat, name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _is_alive(descriptor: int, owner: LockNote, own_host: str) -> bool:
    if owner.host == own_host:
        return Path(f"/proc/{owner.pid}").exists()
    deadline = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENCE_S / 10))
        if _read(descriptor) != owner:
            return True
    return False


def _read(descriptor: int) -> LockNote | None:
    return parse_note(os.pread(descriptor, LARGEST_NOTE, 0))


def _write(descriptor: int, note: LockNote) -> None:
    text = note.dump()
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))
    os.fsync(descriptor)  # for readers on other hosts


def _in_use(owner: LockNote | None, directory: Path) -> EnvironmentFault:
    who = "a process" if owner is None else f"process {owner.pid} on {owner.host} since {owner.started}"
    return EnvironmentFault(f"in use by {who}", directory, "wait for it or stop it")
