"""Durable, atomic writes of files and directories, and checks of the disk before the work.

A reader sees the old state or the new one, never a part: ``write_atomic`` replaces one file, ``staged_directory`` a
directory. Before either, ``refuse_occupied`` and ``refuse_small_disk`` refuse what cannot be written; what a verb's
options name is checked by ``output_files``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from llamatune.errors import EnvironmentFault
from llamatune.safe_reading import digest_bytes

STAGING = ".llamatune-tmp-"
"""The prefix of a file or directory that is not finished; a process id and the final name follow."""
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""Errors of kernels, file systems and containers that cannot swap two names."""
_PROBE = "probe"


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writeback(descriptor: int, begin: int, end: int) -> None:
    """Let the disk write bytes of a file now, so that a later sync waits less (Linux's sync_file_range)."""
    with contextlib.suppress(OSError, AttributeError):
        start = ctypes.CDLL(None).sync_file_range
        start(descriptor, ctypes.c_int64(begin), ctypes.c_int64(end - begin), 2)


def disk_fault(fault: OSError, path: Path, needed: int | None = None) -> EnvironmentFault:
    """The error for a failed write: path, cause, and, where the disk is full, the bytes needed and free."""
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        purpose = "for one more name" if needed is None else f"for {needed:,} bytes"
        what = f"no space left {purpose}, {_free_bytes(path):,} are free"
        return EnvironmentFault(what, path, "free some space and run it again")
    return EnvironmentFault(f"cannot write: {fault.strerror or fault}", path)


def _free_bytes(path: Path) -> int:
    """Free bytes of the disk that holds ``path``, or that would if it existed."""
    path = Path(os.path.realpath(path))
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


@contextlib.contextmanager
def disk_faults(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an ``OSError`` of the block, which writes ``needed`` bytes, into an error that names ``path``."""
    try:
        yield
    except OSError as fault:
        raise disk_fault(fault, path, needed) from fault


@contextlib.contextmanager
def writing(path: Path, size: int = 0, synced: bool = True, begun: bool = False) -> Iterator[BinaryIO]:
    """A new file at ``path`` with the umask's mode, to be read too. Not atomic: for staging directories.

    Args:
        size: its expected number of bytes, for the error when the disk is full.
        synced: before the block ends; else the caller syncs it.
        begun: it is there already.
    """
    written = 0
    try:
        with path.open("r+b" if begun else "x+b") as file:
            try:
                yield file
            finally:
                written = file.tell()
            file.flush()
            if synced:
                os.fsync(file.fileno())
    except OSError as fault:
        raise disk_fault(fault, path, max(size, written) or None) from fault


def link_files(names: Iterable[str], source: Path, directory: Path) -> bool:
    """Give files below ``source`` a second name below ``directory``, a staging directory; False: not possible here.

    What they hold is durable already, and is neither read nor written again.
    """
    made: list[Path] = []
    try:
        for name in names:
            (directory / name).parent.mkdir(exist_ok=True)
            os.link(source / name, directory / name)
            made.append(directory / name)
    except OSError:
        for path in made:
            remove(path)
        return False
    return True


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], None], overwrite: bool = True) -> None:
    """Replace ``path`` by ``content`` durably: temporary file beside it, fsync, rename, fsync of the directory.

    Without ``overwrite``, a file that exists at that moment stays, and ``EnvironmentFault`` is raised.
    """
    temporary = _staging_beside(path)
    try:
        with disk_faults(path):
            temporary.unlink(missing_ok=True)
            with writing(temporary, len(content) if isinstance(content, bytes) else 0) as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
            if overwrite:
                os.replace(temporary, path)
            else:
                _name(temporary, path)
            sync(path.parent)
    finally:
        remove(temporary)


def _name(temporary: Path, path: Path) -> None:
    """Rename a file in one step, unless the name is taken by now."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise _taken(path) from None
    except OSError:  # a file system without hard links: an empty file takes the name
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            raise _taken(path) from None
        os.replace(temporary, path)
    temporary.unlink(missing_ok=True)


def refuse_existing(target: Path, named: Path) -> None:
    """Raise if there is anything at ``target``, which the user called ``named``."""
    if os.path.lexists(target):
        raise _taken(named)


def _taken(path: Path) -> EnvironmentFault:
    return EnvironmentFault("exists", path, "choose another output, or pass --overwrite")


def refuse_occupied(path: Path, overwrite: bool) -> None:
    """Raise unless ``path`` may become an output directory: absent, empty, or to be overwritten."""
    if path.is_symlink() and not path.exists():
        raise EnvironmentFault("a dangling symbolic link", path)
    if not path.exists():
        return
    if not path.is_dir():
        raise EnvironmentFault("exists and is not a directory", path, "choose another output")
    if not overwrite and any(path.iterdir()):
        what = "the directory is not empty and holds something else"
        raise EnvironmentFault(what, path, "choose another one, or pass --overwrite")


def refuse_small_disk(path: Path, needed: int, what: str) -> None:
    """Raise before any work is done if fewer than ``needed`` bytes, and a MiB to spare, are free at ``path``."""
    free = _free_bytes(path)
    if needed + (1 << 20) > free:
        needs = f"{what} needs {needed:,} bytes and {free:,} are free"
        raise EnvironmentFault(needs, path, "free some space, or another disk")


def probe_writable(parent: Path) -> None:
    """Raise before any work is done if nothing can be created, synced and renamed under ``parent``."""
    remove_dead_staging(parent, _PROBE)
    probe, renamed = (_staging_beside(parent / name) for name in (_PROBE, f"renamed-{_PROBE}"))
    with disk_faults(parent):
        try:
            make_directory(parent)
            with probe.open("xb") as file:
                file.write(b"probe")
                file.flush()
                os.fsync(file.fileno())
            os.replace(probe, renamed)
            renamed.unlink()
        except OSError:
            remove(probe)
            raise


def make_directory(path: Path) -> None:
    """Make ``path`` and its missing parents, each durable in the directory that holds it."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in missing:
        sync(place.parent)


def remove_dead_staging(parent: Path, name: str, owned: bool = False) -> None:
    """Remove staging files and directories of ``name`` whose process has ended; nothing else.

    ``owned``: the caller holds a lock on ``parent``, so their process has ended, whichever host it ran on.
    """
    for stale in parent.glob(f"{STAGING}*-{glob.escape(_short(name))}"):
        owner, _, final = stale.name.removeprefix(STAGING).partition("-")
        if owner.isdigit() and (final == _short(name) if owned else not Path(f"/proc/{owner}").exists()):
            remove(stale)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory; what cannot be removed stays, without an error."""
    with contextlib.suppress(OSError):  # is_dir fails too, as on a file system that has gone away
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _staging_beside(path: Path) -> Path:
    """The temporary name of ``path`` in this process."""
    return path.with_name(f"{STAGING}{os.getpid()}-{_short(path.name)}")


def _short(name: str) -> str:
    """``name``, or a digest of one that would leave no room for the prefix within a file name's 255 bytes."""
    return name if len(os.fsencode(name)) <= 200 else digest_bytes(os.fsencode(name))[:32]


@contextlib.contextmanager
def staged_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``path``; when the block ends, it becomes ``path`` durably and in one step.

    The block syncs its files. If it raises, nothing of it remains, and ``path`` is as it was.
    """
    refuse_occupied(path, overwrite)
    path = Path(os.path.realpath(path))
    probe_writable(path.parent)
    remove_dead_staging(path.parent, path.name)
    staging = _staging_beside(path)
    remove(staging)
    try:
        with disk_faults(path):
            staging.mkdir()
            yield staging
            sync(staging)
            if overwrite:
                _swap_in(staging, path)
            else:
                _move_in(staging, path)
    finally:
        remove(staging)


def _move_in(staging: Path, path: Path) -> None:
    """Rename ``staging`` to ``path`` in one step, where nothing or an empty directory stands."""
    try:
        os.rename(staging, path)
    except OSError:
        refuse_occupied(path, overwrite=False)
        raise
    sync(path.parent)


def _swap_in(staging: Path, path: Path) -> None:
    """Rename ``staging`` to ``path`` in one step; what stood there is removed once that is durable."""
    aside = staging
    if not path.exists():
        os.rename(staging, path)
    elif not _exchange(staging, path):
        aside = _staging_beside(path.with_name(f"old-{path.name}"))
        os.rename(path, aside)
        try:
            os.rename(staging, path)
        except OSError:
            os.rename(aside, path)
            raise
    sync(path.parent)
    remove(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux's renameat2); False where kernel or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    current_directory, swap = -100, 2
    if renameat2(current_directory, os.fsencode(one), current_directory, os.fsencode(other), swap) == 0:
        return True
    if (fault := ctypes.get_errno()) not in _NO_EXCHANGE:
        raise OSError(fault, os.strerror(fault))
    return False
