"""The rule of what a verb may write to, the same for every output file and directory.

- What exists is replaced with ``--overwrite`` alone. A verb that continues earlier work (a run, a benchmark,
  answers) and one that finds what it would make replace nothing.
- An output is no input, by whatever name; it does not hold one, and is not inside of an input directory.
- What is no regular file (``/dev/stdout``, a pipe, ``/dev/null``) is written through.

All of it is checked before any work. A name that something else took meanwhile is not given to the finished file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from llamatune.durable_writing import (
    disk_fault,
    probe_writable,
    refuse_existing,
    remove_dead_staging,
    write_atomic,
)
from llamatune.errors import EnvironmentFault, SpecError

STDOUT = Path("/dev/stdout")
WAIT_FOR_READER_S = 2.0
"""For the reader of a pipe to open it."""
_pipes: dict[Path, int] = {}
"""Pipes that were checked, and the descriptors that keep them open."""
_ANOTHER = "choose another output"
_DESCRIPTOR = re.compile(r"/dev/(?:(stdout)|(stderr)|fd/([0-9]+))|/proc/self/fd/([0-9]+)")


def output_file(path: Path, overwrite: bool) -> Path:
    """The path of an output file, links resolved; raises before any work if it cannot be written."""
    if is_stream(path):
        _refuse_closed(path)
        if _is_pipe(path):
            _hold_pipe(path)
        return path
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise EnvironmentFault("exists and is not a regular file", path, _ANOTHER)
    if not overwrite:
        refuse_existing(target, path)
    if not target.parent.is_dir():
        raise EnvironmentFault("no such directory", target.parent, "make it first")
    probe_writable(target.parent)
    return target


def write_output(path: Path, content: bytes | Callable[[BinaryIO], None], overwrite: bool) -> None:
    """Write an output file: durably and all at once, or through what is no regular file.

    Without ``overwrite``, what exists by now stays, and ``EnvironmentFault`` is raised.
    """
    if not is_stream(path):
        target = Path(os.path.realpath(path))
        remove_dead_staging(target.parent, target.name)
        write_atomic(target, content, overwrite)
        return
    with open_stream(path) as file, stream_faults(path):
        if isinstance(content, bytes):
            file.write(content)
        else:
            content(file)
        file.flush()


def descriptor_of(path: Path) -> int | None:
    """The open file that a path names, itself or by links: 1 of ``/dev/stdout``, 63 of ``/dev/fd/63``."""
    for _ in range(40):  # links may form a circle
        if match := _DESCRIPTOR.fullmatch(str(path)):
            stdout, stderr, *numbers = match.groups()
            return 1 if stdout else 2 if stderr else int(numbers[0] or numbers[1])
        if not path.is_symlink():
            return None
        path = path.parent / os.readlink(path)
    return None


def is_stream(path: Path) -> bool:
    """Whether ``path`` is written through: the descriptor of an open file, a pipe, a terminal, a null device."""
    if descriptor_of(path) is not None:
        return True
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(kind) or stat.S_ISCHR(kind)


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """A stream, to write to and to flush within ``stream_faults``."""
    descriptor = descriptor_of(path)
    if descriptor == 1:
        sys.stdout.flush()
        yield sys.stdout.buffer
        return
    with stream_faults(path):
        if descriptor is not None:
            number = os.dup(descriptor)
        else:
            number = _pipes.pop(path, -1)
            number = os.open(path, os.O_WRONLY) if number < 0 else number
    file = os.fdopen(number, "wb")
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):  # the writer flushed, and was told
            file.close()


@contextlib.contextmanager
def stream_faults(path: Path) -> Iterator[None]:
    """As ``disk_faults``; but that the reader of stdout has left is no fault, and ends the block."""
    try:
        yield
    except OSError as fault:
        if descriptor_of(path) != 1 or not isinstance(fault, BrokenPipeError):
            raise disk_fault(fault, path) from fault


def _is_pipe(path: Path) -> bool:
    return descriptor_of(path) is None and path.is_fifo()


def _hold_pipe(path: Path) -> None:
    """Open a pipe until it is written to: closed before, it would end for its reader."""
    limit = time.monotonic() + WAIT_FOR_READER_S
    while path not in _pipes:
        try:
            _pipes[path] = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.set_blocking(_pipes[path], True)
        except OSError as fault:
            if fault.errno != errno.ENXIO:
                raise disk_fault(fault, path) from fault
            if time.monotonic() > limit:
                raise EnvironmentFault("a pipe that no program reads", path, "start its reader first") from None
            time.sleep(0.05)


def _refuse_closed(path: Path) -> None:
    """Raise unless a stream may be written to."""
    descriptor = descriptor_of(path)
    try:
        if descriptor is None:
            writable = os.access(path, os.W_OK)
        else:
            writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    except OSError:
        writable = False
    if not writable:
        raise EnvironmentFault("not open for writing", path, _ANOTHER)


def refuse_unwritable(path: Path) -> None:
    """Raise if nothing can be made in the directory ``path``, or it cannot be made, as far as a look can tell."""
    place = next(place for place in (path, *Path(os.path.abspath(path)).parents) if place.exists())
    if not place.is_dir():
        raise EnvironmentFault("exists and is not a directory", place, _ANOTHER)
    if not os.access(place, os.W_OK | os.X_OK):
        raise EnvironmentFault("cannot write: Permission denied", place, _ANOTHER)


def refuse_replacing(
    output: Path, inputs: Iterable[tuple[str, Path]], option: str = "--output", keeps: bool = False
) -> None:
    """Raise ``SpecError`` where ``output`` is or holds an input, given by its option, or a file that one links to.

    Args:
        keeps: what a directory holds stays there, so it may hold an input.
    """
    if is_stream(output):
        return
    made = Path(os.path.realpath(output))
    _refuse_standard(output, option)
    for name, given in inputs:
        place = Path(os.path.realpath(given))
        links = [entry for entry in given.iterdir() if entry.is_symlink()] if given.is_dir() else []
        for read in (place, *(Path(os.path.realpath(link)) for link in links)):
            if made == read or (made in read.parents and not keeps):
                raise SpecError(f"{option} would replace {name}", output, _ANOTHER)
        if _is_linked(made, place):
            raise SpecError(f"{option} is another name of a file of {name}", output, _ANOTHER)


def _refuse_standard(output: Path, option: str) -> None:
    """Raise where stdin comes from the file ``output``, or stdout or stderr go there."""
    for number, name in enumerate(("standard input comes from", "standard output goes to", "standard error goes to")):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(output), os.fstat(number)):
                raise SpecError(f"{option} is the file that {name}", output, "choose another output, or - for stdout")


def refuse_inside(output: Path, inputs: Iterable[tuple[str, Path]], option: str = "--output") -> None:
    """Raise ``SpecError`` where ``output`` is in an input directory, given by its option."""
    if is_stream(output):
        return
    parents = Path(os.path.realpath(output)).parents
    for name, given in inputs:
        if given.is_dir() and Path(os.path.realpath(given)) in parents:
            raise SpecError(f"{option} is inside of {name}", output, _ANOTHER)


def _is_linked(made: Path, place: Path) -> bool:
    """Whether ``made`` is a hard link of the file ``place``, or of a file below that directory."""
    if not made.is_file() or (status := made.stat()).st_nlink < 2:
        return False
    files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
    return any(path.exists() and os.path.samestat(status, path.stat()) for path in files)
