"""Where rows are read from: a regular file, a directory of a data set, or a pipe, which is kept in a temporary file.

Preparation reads its inputs several times. Within ``pipes_kept`` a pipe and standard input (``-``) can be read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, cast

from llamatune.data.saved_dataset import data_files
from llamatune.errors import DataError, EnvironmentFault, Stopped
from llamatune.events import ShouldStop, never_stop
from llamatune.safe_reading import digest_bytes, digest_file, open_regular, read_faults

STANDARD_INPUT = Path("-")
_PORTION = 1 << 20
_POLL_MS = 200
WAIT_FOR_WRITER_S = 10.0
_COMPRESSION = 4  # about: so many bytes of rows for one of a compressed file

_kept: dict[Path, BinaryIO] = {}
"""The content of pipes, by path."""


def is_pipe(path: Path) -> bool:
    """Whether ``path`` is a pipe or standard input, which can be read only once."""
    return path == STANDARD_INPUT or path in _kept or _is(stat.S_ISFIFO, path)


def is_directory(path: Path) -> bool:
    """Whether ``path`` is a directory; not what cannot be looked at, which opening it tells."""
    return path != STANDARD_INPUT and _is(stat.S_ISDIR, path)


def _is(kind: Callable[[int], bool], path: Path) -> bool:
    with contextlib.suppress(OSError):
        return kind(os.stat(path).st_mode)
    return False


@contextlib.contextmanager
def pipes_kept(paths: Iterable[Path], should_stop: ShouldStop = never_stop) -> Iterator[None]:
    """Read the pipes among ``paths`` to their end; ``Stopped`` if ``should_stop`` says so meanwhile."""
    with contextlib.ExitStack() as stack:
        for path in paths:
            if is_pipe(path) and path not in _kept:
                _kept[path] = stack.enter_context(temporary_copy(_portions(path, should_stop), path))
                stack.callback(_kept.pop, path)
        yield


def open_source(path: Path) -> BinaryIO:
    """A regular file or the content of a pipe, for reading; ``DataError`` for anything else."""
    if path in _kept:
        # On Linux this descriptor has a position of its own.
        again = os.fdopen(os.open(f"/dev/fd/{_kept[path].fileno()}", os.O_RDONLY | os.O_CLOEXEC), "rb")
        again.seek(0)
        return again
    if is_pipe(path):
        return temporary_copy(_portions(path), path)
    return open_regular(path, DataError)


def source_files(path: Path) -> list[Path]:
    """The regular files that ``path`` stands for; none for a pipe."""
    if is_pipe(path):
        return []
    with read_faults(path):
        return data_files(path) if is_directory(path) else [path]


def source_state(path: Path) -> list[tuple[int, int, int]]:
    """What differs if a file of ``path`` was changed meanwhile."""
    return [(status.st_ino, status.st_size, status.st_mtime_ns) for status in map(_status, source_files(path))]


def source_bytes(path: Path) -> int:
    """About how many bytes of rows there are."""
    if path in _kept:
        return os.fstat(_kept[path].fileno()).st_size
    files = source_files(path)
    ratio = _COMPRESSION if files and files[0].suffix.lower() in (".gz", ".zst", ".parquet") else 1
    return ratio * sum(_status(file).st_size for file in files)


def source_digest(path: Path) -> str:
    """SHA-256 of a file or of a pipe's content; of a directory, of its files' digests."""
    if is_pipe(path):
        with open_source(path) as file:
            return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()
    if not is_directory(path):
        return digest_file(path, DataError)
    return digest_bytes("\n".join(digest_file(file, DataError) for file in source_files(path)).encode())


def _status(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as fault:
        raise DataError(f"cannot read: {fault.strerror}", path) from None
    except OSError as fault:
        raise EnvironmentFault(f"cannot read: {fault.strerror}", path) from None


def temporary_copy(portions: Iterable[bytes], path: Path) -> BinaryIO:
    """The content of ``path``, given in ``portions``, in a temporary file without a name, at its beginning."""
    with contextlib.ExitStack() as stack:
        try:
            copy = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
            stack.callback(copy.close)
            for portion in portions:
                copy.write(portion)
            copy.seek(0)
        except OSError as fault:
            what = f"cannot keep its content in {tempfile.gettempdir()}: {fault.strerror}"
            raise EnvironmentFault(what, path, "set TMPDIR to a directory with room for it") from None
        stack.pop_all()
        return cast(BinaryIO, copy)


def _portions(path: Path, should_stop: ShouldStop = never_stop) -> Iterator[bytes]:
    """The content of a pipe; ``DataError`` if nobody opens it for writing."""
    with _opened(path) as descriptor, read_faults(path):
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        waits, limit = path != STANDARD_INPUT, time.monotonic() + WAIT_FOR_WRITER_S
        while True:
            if should_stop():
                raise Stopped("stopped before the rows were read", None, "run the same command again")
            ready = bool(poll.poll(_POLL_MS))
            if not ready and not waits:
                continue
            try:
                portion = os.read(descriptor, _PORTION)
            except BlockingIOError:  # there is a writer, which has written nothing yet
                waits = False
                continue
            if portion:
                waits = False
                yield portion
            elif ready:
                return
            elif time.monotonic() > limit:
                raise DataError("not a regular file but a pipe, and no program writes to it", path)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The descriptor of a pipe, which does not wait for a writer, or of standard input."""
    if path == STANDARD_INPUT:
        if os.isatty(0):
            raise DataError("standard input is a terminal", None, "pipe rows in, or name a file")
        yield 0
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as fault:
        raise EnvironmentFault(f"cannot open: {fault.strerror}", path) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)
