"""A new file of a product, synced, whose SHA-256 is computed behind the writing; bytes of other files are copied in.

The kernel copies. The digest is of what was written, read from the page cache by a thread of its own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from llamatune.durable_writing import start_writeback, writing
from llamatune.errors import CheckpointError
from llamatune.formats.begun_files import BegunFile
from llamatune.formats.file_range import FileRange
from llamatune.formats.manifest import PendingDigest, Staging
from llamatune.safe_reading import open_regular

_BLOCK_BYTES = 1 << 20
_COPIED_BYTES = 32 << 20
"""Copied by one call."""
_FOLLOWED_BYTES = 8 << 20
"""Digested, and sent to the disk, at once: the sync at the end then has little to wait for."""
_DIGESTS_AT_ONCE = 4
"""Of so many files; they lag behind the writing, which waits for no digest until then."""
_NO_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""Errors of kernels and file systems that cannot copy from one file to another."""


@contextlib.contextmanager
def writing_digested(staging: Staging, file_name: str, size: int) -> Iterator[DigestedFile]:
    """A new file of about ``size`` bytes in a product, which syncs it at its end; the digest may be ready later."""
    path, begun = staging.path / file_name, staging.begun.get(file_name)
    staging.finish_digests(but=_DIGESTS_AT_ONCE - 1)
    if begun is not None and not begun.take_name(path):
        begun = None
    with writing(path, size, synced=False, begun=begun is not None) as file:
        made = DigestedFile(file, path, begun)
        try:
            yield made
            digest = made.finish()
        except BaseException:
            made.abandon()
            raise
    staging.digesting[file_name] = digest


class DigestedFile:
    """A new file that is written from its beginning to its end; make it with ``writing_digested``."""

    def __init__(self, file: BinaryIO, path: Path, begun: BegunFile | None = None) -> None:
        self.path, self.position, self._begun = path, 0, begun
        self._file, self._descriptor = file, file.fileno()
        self._by_kernel = hasattr(os, "copy_file_range")
        self._followed, self._digest = 0, _FollowingDigest(file)

    def append(self, data: bytes | memoryview | FileRange) -> None:
        """Write bytes, or copy those of another file.

        Raises:
            CheckpointError: the other file became shorter.
        """
        if isinstance(data, FileRange):
            self._copy(data)
        else:
            self._file.write(data)
            self.position += memoryview(data).nbytes

    def rewrite(self, begin: int, data: bytes) -> None:
        """Replace bytes, of which ``follow`` must not have been told."""
        self._file.seek(begin)
        self._file.write(data)
        self._file.seek(self.position)

    def _copy(self, source: FileRange) -> None:
        self._file.flush()
        begin = source.begin
        if self._begun is not None and self._begun.holds(self.position, source):
            self.position += source.end - begin
            self._file.seek(self.position)
            return
        with open_regular(source.path) as file:
            while begin < source.end:
                count = self._copy_some(file.fileno(), begin, min(_COPIED_BYTES, source.end - begin))
                if not count:
                    todo = "do not replace files in use"
                    raise CheckpointError("became shorter while it was read", source.path, todo)
                begin, self.position = begin + count, self.position + count
        self._file.seek(self.position)

    def _copy_some(self, source: int, begin: int, size: int) -> int:
        if self._by_kernel:
            try:
                if count := os.copy_file_range(source, self._descriptor, size, begin, self.position):
                    return count
            except OSError as fault:
                if fault.errno not in _NO_COPY:
                    raise
            self._by_kernel = False
        block = os.pread(source, min(_BLOCK_BYTES, size), begin)
        return os.pwrite(self._descriptor, block, self.position)

    def follow(self) -> None:
        """Digest what is written so far: it changes no more."""
        if self.position - self._followed >= _FOLLOWED_BYTES:
            self._file.flush()
            self._digest.follow(self.position)
            start_writeback(self._descriptor, self._followed, self.position)
            self._followed = self.position

    def finish(self) -> PendingDigest:
        """Digest all that is written, a large file behind what follows."""
        self._file.flush()
        if self._begun is not None:  # with what it was not to hold
            self._file.truncate(self.position)
        self._digest.finish(self.position)
        return self._digest

    def abandon(self) -> None:
        """Digest no more."""
        self._digest.abandon()

    def copied(self, begin: int) -> Iterator[memoryview]:
        """What was copied from ``begin`` on, a MiB at a time; each is valid until the next."""
        return _blocks(self._descriptor, begin, self.position)


class _FollowingDigest:
    """The SHA-256 of a file, computed behind its writing by a thread; of a small file by the caller, at its end."""

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor = os.dup(file.fileno())
        self._sha256, self._done = hashlib.sha256(), 0
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def follow(self, end: int) -> None:
        """Go on to ``end``."""
        self._thread = self._thread or ThreadPoolExecutor(1, "digest")
        self._last = self._thread.submit(self._update, end)

    def finish(self, end: int) -> None:
        """Go on to the end of the file."""
        if self._thread is None:
            self._update(end)
            self._close()
        else:
            self.follow(end)
            self._thread.submit(self._close)
            self._thread.shutdown(wait=False)

    def result(self) -> str:
        if self._last is not None:
            self._last.result()
        return self._sha256.hexdigest()

    def abandon(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _update(self, end: int) -> None:
        """After a fault, the next update begins where it was met, so that the last one meets it too."""
        for block in _blocks(self._descriptor, self._done, end):
            self._sha256.update(block)
            self._done += len(block)


def _blocks(descriptor: int, begin: int, end: int) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, end - begin)))
    while begin < end:
        count = os.preadv(descriptor, [buffer[: end - begin]], begin)
        if not count:
            raise OSError(errno.EIO, "what was written cannot be read back")
        yield buffer[:count]
        begin += count
