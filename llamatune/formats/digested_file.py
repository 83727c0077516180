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
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llamatune.durable_writing import start_writeback, writing
from llamatune.errors import CheckpointError
from llamatune.formats.manifest import Staging
from llamatune.safe_reading import open_regular

_BLOCK_BYTES = 1 << 20
_COPIED_BYTES = 32 << 20
"""Copied by one call."""
_FOLLOWED_BYTES = 8 << 20
"""Digested, and sent to the disk, at once: the sync at the end then has little to wait for."""
_NO_COPY = (errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""Errors of kernels and file systems that cannot copy from one file to another."""


@dataclass(frozen=True)
class FileRange:
    """Bytes ``begin:end`` of a file."""

    path: Path
    begin: int
    end: int


@contextlib.contextmanager
def writing_digested(staging: Staging, file_name: str, size: int) -> Iterator[DigestedFile]:
    """A new file of about ``size`` bytes in a product; digested and synced when the block ends."""
    path = staging.path / file_name
    with writing(path, size) as file, ThreadPoolExecutor(1, "digest") as reader:
        made = DigestedFile(file, path, reader)
        try:
            yield made
        except BaseException:
            reader.shutdown(cancel_futures=True)
            raise
        staging.digests[file_name] = made.digest()


class DigestedFile:
    """A new file that is written from its beginning to its end; make it with ``writing_digested``."""

    def __init__(self, file: BinaryIO, path: Path, reader: ThreadPoolExecutor) -> None:
        self.path, self.position = path, 0
        self._file, self._descriptor, self._reader = file, file.fileno(), reader
        self._by_kernel = hasattr(os, "copy_file_range")
        self._sha256 = hashlib.sha256()
        self._followed, self._reads = 0, list[Future[None]]()

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
            self._reads.append(self._reader.submit(self._update, self._followed, self.position))
            start_writeback(self._descriptor, self._followed, self.position)
            self._followed = self.position

    def digest(self) -> str:
        """Of the whole file."""
        self._file.flush()
        for read in self._reads:
            read.result()
        self._update(self._followed, self.position)
        return self._sha256.hexdigest()

    def _update(self, begin: int, end: int) -> None:
        for block in self.blocks(begin, end):
            self._sha256.update(block)

    def blocks(self, begin: int, end: int) -> Iterator[memoryview]:
        """What was copied there, or ``follow`` was told of, a MiB at a time; each is valid until the next."""
        buffer = memoryview(bytearray(min(_BLOCK_BYTES, end - begin)))
        while begin < end:
            count = os.preadv(self._descriptor, [buffer[: end - begin]], begin)
            if not count:
                raise OSError(errno.EIO, "what was written cannot be read back")
            yield buffer[:count]
            begin += count
