"""Opening and reading of files that could be hostile: regular files only, of a bounded size; SHA-256 digests."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from llamatune.errors import CheckpointError, EnvironmentFault, LlamatuneError

_MEBIBYTE = 1 << 20


def open_regular(
    path: Path, error: type[LlamatuneError] = CheckpointError, max_bytes: int | None = None
) -> BufferedReader:
    """Open a regular file for reading; a missing, special or oversized one raises ``error``."""
    try:
        # O_NONBLOCK: opening a FIFO for reading would otherwise wait for a writer for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise error("no such file", path) from None
    except OSError as fault:
        raise EnvironmentFault(f"cannot open: {fault.strerror}", path) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise error(f"{what} where a file is expected", path)
    if max_bytes is not None and status.st_size > max_bytes:
        os.close(descriptor)
        raise error(f"{status.st_size:,} bytes, more than the {max_bytes:,} that such a file may have", path)
    return os.fdopen(descriptor, "rb")


def open_own(path: Path, flags: int) -> int:
    """The descriptor of a regular file that we add to or lock, made if it is absent; what else stands there is refused.

    Opening a FIFO would wait for another process, and a device would take what is written.
    """
    descriptor = os.open(path, flags | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise EnvironmentFault("not a regular file where a file is expected", path, "remove it")
    return descriptor


@contextlib.contextmanager
def read_faults(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` of the block into an error that names ``path``."""
    try:
        yield
    except OSError as fault:
        raise EnvironmentFault(f"cannot read: {fault.strerror}", path) from None


def read_bytes(path: Path, error: type[LlamatuneError] = CheckpointError, max_bytes: int = _MEBIBYTE) -> bytes:
    """The whole of a small regular file."""
    with open_regular(path, error, max_bytes) as file, read_faults(path):
        return file.read()


def stand_in(head: bytes) -> str | None:
    """What was fetched in place of a binary file, by its first bytes: a git-lfs pointer, an HTML page, or None."""
    if head.startswith(b"version "):
        return "a git-lfs pointer, not the file itself"
    if head.lstrip().lower().startswith((b"<!doc", b"<html")):
        return "an HTML page, not the file itself"
    return None


def digest_bytes(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path, error: type[LlamatuneError] = CheckpointError) -> str:
    """SHA-256 of a regular file of any size, in hexadecimal."""
    with open_regular(path, error) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
