"""One run, one directory: a lock that dies with its process, also where the file system has none to give."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamatune.durable_writing import disk_faults
from llamatune.errors import EnvironmentFault
from llamatune.strict_json import parse_json

LOCK = ".llamatune.lock"
"""The first file that a run makes; it names the owner while there is one."""

HEARTBEAT_S, SILENCE_S, SETTLING_S = 10.0, 35.0, 2.0
"""Without the kernel's locks: how often an owner writes, how long a silent one is waited for, and for how long a new
owner looks whether somebody else claimed the directory in the same moment."""

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Own ``directory`` for the length of the block.

    Raises:
        EnvironmentFault: a living process owns it, with its host, id and start time.
    """
    with disk_faults(directory / LOCK):
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with disk_faults(directory / LOCK):
            keeping = _claim(descriptor, directory)
        try:
            with keeping:
                yield
        finally:
            with contextlib.suppress(OSError):  # a note too many harms nobody
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _claim(descriptor: int, directory: Path) -> contextlib.AbstractContextManager[None]:
    """Become the owner; what is given back keeps it so."""
    note = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
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


def _heartbeat(descriptor: int, note: dict[str, Any], directory: Path) -> contextlib.AbstractContextManager[None]:
    """Claim by a note that changes as long as its writer lives. Clocks and file times are not compared."""
    owner = _read(descriptor)
    if owner is not None and _lives(descriptor, owner, note["host"]):
        raise _in_use(owner, directory)
    claim = {**note, "claim": os.urandom(8).hex(), "beat": 0}
    _write(descriptor, claim)
    time.sleep(SETTLING_S)
    last = _read(descriptor)
    if last is not None and last.get("claim") != claim["claim"]:
        raise _in_use(last, directory)
    return _beating(descriptor, claim)


@contextlib.contextmanager
def _beating(descriptor: int, claim: dict[str, Any]) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_S):
            claim["beat"] += 1
            with contextlib.suppress(OSError):  # a server that is away for a moment; the next beat tells
                _write(descriptor, claim)

    thread = threading.Thread(target=beat, name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _lives(descriptor: int, owner: dict[str, Any], own_host: str) -> bool:
    if owner.get("host") == own_host:
        return Path(f"/proc/{owner.get('pid')}").exists()
    deadline = time.monotonic() + SILENCE_S
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENCE_S / 10))
        if _read(descriptor) != owner:
            return True
    return False


def _read(descriptor: int) -> dict[str, Any] | None:
    try:
        note = parse_json(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    return note if isinstance(note, dict) else None


def _write(descriptor: int, note: dict[str, Any]) -> None:
    text = json.dumps(note).encode()
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))
    os.fsync(descriptor)  # for those who look from another host


def _in_use(owner: dict[str, Any] | None, directory: Path) -> EnvironmentFault:
    named = owner is not None and {"pid", "host", "started"} <= owner.keys()
    who = f"process {owner['pid']} on {owner['host']} since {owner['started']}" if owner and named else "a process"
    return EnvironmentFault(f"in use by {who}", directory, "wait for it or stop it")
