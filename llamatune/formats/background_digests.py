"""SHA-256 of files by a background thread of the lowest priority, at a bounded rate; shared by the runs of a sweep."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from llamatune.events import ShouldStop, never_stop
from llamatune.safe_reading import open_regular

_BLOCK_BYTES = 4 << 20
"""Read and digested at once, without Python's lock: it is taken twice for each."""
_BYTES_A_SECOND = 256 << 20
"""While somebody computes: a fifth of a core, and little of what a disk gives."""
_LOWEST = 19


class BackgroundDigests:
    """Digests ``files`` in their order, as they are when this is made: one that is replaced later is not followed.

    ``unreadable`` says of which there is no digest, and why. Who waits digests by itself.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._found: dict[str, tuple[int, str]] = {}
        self.unreadable: dict[str, str] = {}
        self._left = deque((name, open_regular(path)) for name, path in files.items())
        self._sha256, self._done_bytes, self._buffer = hashlib.sha256(), 0, memoryview(bytearray(_BLOCK_BYTES))
        self._lock, self._nobody_waits, self._abandoned = threading.Lock(), threading.Event(), threading.Event()
        self._nobody_waits.set()
        self._thread = threading.Thread(target=self._digest_all, name="digests", daemon=True)
        self._users = 1

    def join(self) -> bool:
        """Count one more user, who will ``abandon`` it too; False: all have, and it is over."""
        self._users += self._users > 0
        return self._users > 0

    def start(self) -> None:
        if self._left and self._thread.ident is None:
            self._thread.start()

    @property
    def found(self) -> dict[str, tuple[int, str]]:
        """Size in bytes and SHA-256 of the files that are done, in their order."""
        return dict(self._found)

    def wait(self, seconds: float | None, should_stop: ShouldStop = never_stop) -> bool:
        """Digest at full speed for so long (None: to the end); whether every file is done."""
        deadline = None if seconds is None else time.monotonic() + seconds
        self._nobody_waits.clear()
        while (is_left := self._advance()) and not should_stop():
            if deadline is not None and time.monotonic() > deadline:
                break
        self._nobody_waits.set()
        return not is_left

    def abandon(self) -> None:
        """Digest no more, unless another user is left."""
        self._users -= 1
        if self._users > 0:
            return
        self._abandoned.set()
        self._nobody_waits.set()
        if self._thread.ident is not None:
            self._thread.join()
        for _, file in self._left:
            file.close()

    def _digest_all(self) -> None:
        _lower_priority()
        due = time.monotonic()
        while not self._abandoned.is_set() and self._advance():
            due = max(due + _BLOCK_BYTES / _BYTES_A_SECOND, time.monotonic())
            self._abandoned.wait(due - time.monotonic())
            self._nobody_waits.wait()

    def _advance(self) -> bool:
        """Digest one block more; whether any is left."""
        with self._lock:
            if not self._left:
                return False
            name, file = self._left[0]
            try:
                if count := file.readinto(self._buffer):
                    self._sha256.update(self._buffer[:count])
                    self._done_bytes += count
                    return True
                if os.fstat(file.fileno()).st_size == self._done_bytes:
                    self._found[name] = (self._done_bytes, self._sha256.hexdigest())
                else:
                    self.unreadable[name] = "it became shorter while it was read"
            except OSError as fault:
                self.unreadable[name] = f"cannot read: {fault.strerror}"
            self._left.popleft()
            file.close()
            self._sha256, self._done_bytes = hashlib.sha256(), 0
            return bool(self._left)


class SharedDigests:
    """Digests for several users, of whom one at a time runs: those of the same files are taken once for all."""

    def __init__(self) -> None:
        self._made: dict[tuple[tuple[str, Path], ...], BackgroundDigests] = {}

    def __call__(self, files: Mapping[str, Path]) -> BackgroundDigests:
        key = tuple(files.items())
        if key not in self._made or not self._made[key].join():
            self._made[key] = BackgroundDigests(files)
        return self._made[key]


def _lower_priority() -> None:
    """Of this thread alone, which only Linux can do."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST)
