"""Durable, atomic writes and bounded, safe reads.

Everything the project writes goes through ``write_atomic`` (one file) or ``build_directory`` (a whole product), so a
reader sees the old state or the new one, never a part. Everything it reads that could be hostile goes through
``open_regular`` (no FIFO or device can hang or feed us for ever) and ``read_json`` (bounded, strict).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from llamatune.errors import CheckpointError, EnvironmentFault, LlamatuneError

MANIFEST = "llamatune.json"
"""The description that every product directory carries: its kind, its inputs, and size and SHA-256 of each file."""

STAGING = ".llamatune-tmp-"
"""How the names begin of what is being made; a process id and the name to be follow."""
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
"""What kernels, file systems and containers answer that cannot swap two names."""
_PROBE = "probe"
_MEBIBYTE = 1 << 20


def open_regular(path: Path, error: type[LlamatuneError] = CheckpointError, max_bytes: int | None = None) -> BinaryIO:
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


def read_bytes(path: Path, error: type[LlamatuneError] = CheckpointError, max_bytes: int = _MEBIBYTE) -> bytes:
    """The whole of a small regular file."""
    with open_regular(path, error, max_bytes) as file:
        try:
            return file.read()
        except OSError as fault:
            raise EnvironmentFault(f"cannot read: {fault.strerror}", path) from None


def parse_json(text: str | bytes) -> Any:
    """Strict JSON: ``ValueError`` on NaN, duplicate keys, lone surrogates, endless nesting or endless digits."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} appears twice")
        return made

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=object_of, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a lone surrogate, which is no character") from None
    return value


def read_json(path: Path, error: type[LlamatuneError] = CheckpointError, max_bytes: int = _MEBIBYTE) -> dict[str, Any]:
    """A JSON object from a bounded regular file."""
    try:
        value = parse_json(read_bytes(path, error, max_bytes))
    except ValueError as fault:
        raise error(f"not valid JSON: {fault}", path) from None
    if not isinstance(value, dict):
        raise error("not a JSON object", path)
    return value


def dump_json(value: Any) -> bytes:
    """Strict, readable JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def dump_json_lines(values: Iterable[Any]) -> bytes:
    """Strict JSON, one value a line."""
    return "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values).encode()


def digest_bytes(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path, error: type[LlamatuneError] = CheckpointError) -> str:
    """SHA-256 of a regular file of any size, in hexadecimal."""
    with open_regular(path, error) as file:
        digest = hashlib.sha256()
        while block := file.read(_MEBIBYTE):
            digest.update(block)
        return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_fault(fault: OSError, path: Path, needed: int | None = None) -> EnvironmentFault:
    """What a failed write means to the user: path, cause, and, where the disk is full, the bytes needed and free."""
    if fault.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        wanted = "for one more name" if needed is None else f"for {needed:,} bytes"
        return EnvironmentFault(f"no space left {wanted}, {free:,} are free", path, "free some space and run it again")
    return EnvironmentFault(f"cannot write: {fault.strerror or fault}", path)


@contextlib.contextmanager
def disk_faults(path: Path, needed: int | None = None) -> Iterator[None]:
    """What the block cannot write, ``needed`` bytes of it, is an ``EnvironmentFault`` that names ``path``."""
    try:
        yield
    except OSError as fault:
        raise disk_fault(fault, path, needed) from fault


@contextlib.contextmanager
def writing(path: Path, size: int = 0) -> Iterator[BinaryIO]:
    """A new file at ``path`` with the umask's mode, synced before the block ends. Not atomic: for staging areas.

    ``size``: how many bytes it will have about, where that is known before they are written.
    """
    written = 0
    try:
        with path.open("xb") as file:
            try:
                yield file
            finally:
                written = file.tell()
            file.flush()
            os.fsync(file.fileno())
    except OSError as fault:
        raise disk_fault(fault, path, max(size, written) or None) from fault


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], None], overwrite: bool = True) -> None:
    """Replace ``path`` by ``content`` durably: temp file beside it, fsync, rename, fsync of the directory.

    Without ``overwrite`` a file that has appeared there meanwhile stays, and ``EnvironmentFault`` is raised.
    """
    temporary = _staging_beside(path)
    try:
        temporary.unlink(missing_ok=True)
        with writing(temporary, len(content) if isinstance(content, bytes) else 0) as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
        if not overwrite:
            _refuse_existing(path, path)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as fault:
        raise disk_fault(fault, path) from fault
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def output_file(path: Path, overwrite: bool) -> Path:
    """Where a file that is asked for will be written, links followed; raises before any work if it cannot be.

    Every option that names a file to be written passes here first, with the verb's ``--overwrite``.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise EnvironmentFault("exists and is not a regular file", path, "choose another output")
    if not overwrite:
        _refuse_existing(target, path)
    if not target.parent.is_dir():
        raise EnvironmentFault("no such directory", target.parent, "make it first")
    probe_writable(target.parent)
    return target


def _refuse_existing(target: Path, named: Path) -> None:
    if target.exists():
        raise EnvironmentFault("exists", named, "choose another output, or pass --overwrite")


def _describe_files(staging: Staging) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of a product but the manifest itself, by relative POSIX path."""
    found = sorted(p for p in staging.path.rglob("*") if p.is_file() and p.name != MANIFEST)
    described = {}
    for path in found:
        name = path.relative_to(staging.path).as_posix()
        described[name] = {"bytes": path.stat().st_size, "sha256": staging.digests.get(name) or digest_file(path)}
    return described


def refuse_occupied(path: Path, overwrite: bool) -> None:
    """Raise unless ``path`` may become an output directory: absent, empty, or to be overwritten."""
    if path.is_symlink() and not path.exists():
        raise EnvironmentFault("a dangling symbolic link", path)
    if not path.exists():
        return
    if not path.is_dir():
        raise EnvironmentFault("exists and is not a directory", path, "choose another output")
    if not overwrite and next(path.iterdir(), None) is not None:
        raise EnvironmentFault(
            "the directory is not empty and holds something else", path, "choose another one, or pass --overwrite"
        )


def refuse_small_disk(path: Path, needed: int, what: str) -> None:
    """Raise before any work is done if fewer than ``needed`` bytes, and a MiB to spare, are free at ``path``."""
    existing = next(found for found in (path, *path.resolve().parents) if found.exists())
    free = shutil.disk_usage(existing).free
    if needed + _MEBIBYTE > free:
        raise EnvironmentFault(
            f"{what} needs {needed:,} bytes and {free:,} are free", path, "free some space, or another disk"
        )


def probe_writable(parent: Path) -> None:
    """Raise before any work is done if nothing can be created, synced and renamed under ``parent``."""
    remove_dead_staging(parent, _PROBE)
    probe = _staging_beside(parent / _PROBE)
    try:
        make_directory(parent)
        with probe.open("xb") as file:
            file.write(b"probe")
            file.flush()
            os.fsync(file.fileno())
        renamed = _staging_beside(parent / f"renamed-{_PROBE}")
        os.replace(probe, renamed)
        renamed.unlink()
    except OSError as fault:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
        raise disk_fault(fault, parent) from fault


def make_directory(path: Path) -> None:
    """Make ``path`` and its missing parents, each durable in the directory that holds it."""
    missing = [found for found in (path, *path.parents) if not found.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_directory(made.parent)


def remove_dead_staging(parent: Path, name: str, owned: bool = False) -> None:
    """Remove what was being made for ``name`` by a process that is gone; never anything that is not ours.

    ``owned``: the caller holds a lock on ``parent``, so whoever was making it is gone, on whichever host it ran.
    """
    for stale in parent.glob(f"{STAGING}*-{glob.escape(_short(name))}"):
        owner, _, made = stale.name.removeprefix(STAGING).partition("-")
        if owner.isdigit() and (made == _short(name) if owned else not Path(f"/proc/{owner}").exists()):
            remove(stale)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory as far as it goes; what stays is tried again another time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _staging_beside(path: Path) -> Path:
    """Where this process makes what will be ``path``."""
    return path.with_name(f"{STAGING}{os.getpid()}-{_short(path.name)}")


def _short(name: str) -> str:
    """``name``, or a digest of one that would leave no room for the prefix within a file name's 255 bytes."""
    return name if len(os.fsencode(name)) <= 200 else digest_bytes(os.fsencode(name))[:32]


@dataclass
class Staging:
    """A product in the making: write files below ``path``, and what readers should know into ``facts``.

    ``digests`` are the SHA-256 of files that were digested while they were written, by name; others are read again.
    """

    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def build_directory(path: Path, kind: str, inputs: dict[str, Any], overwrite: bool = False) -> Iterator[Staging]:
    """Yield an empty staging directory beside ``path``; when the block ends it becomes ``path``, with a manifest.

    The order is: files synced, manifest with their digests synced, directory synced, rename, parent synced. If the
    block raises, nothing of it remains and whatever stood at ``path`` still stands.
    """
    refuse_occupied(path, overwrite)
    path = Path(os.path.realpath(path))
    probe_writable(path.parent)
    remove_dead_staging(path.parent, path.name)
    staging = _staging_beside(path)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        product = Staging(staging)
        yield product
        _sync_tree(staging)
        manifest = {
            "kind": kind,
            "schema": 1,
            "inputs": inputs,
            "facts": product.facts,
            "files": _describe_files(product),
        }
        with writing(staging / MANIFEST) as file:
            file.write(dump_json(manifest))
        sync_directory(staging)
        _swap_in(staging, path)
    except OSError as fault:
        raise disk_fault(fault, path) from fault
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    for found in directory.rglob("*"):
        descriptor = os.open(found, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap_in(staging: Path, path: Path) -> None:
    """Let ``staging`` become ``path`` in one step; what stood there is removed once that is durable."""
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
    sync_directory(path.parent)
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
