"""Files compared with the size and SHA-256 that are recorded of each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from llamatune.errors import CheckpointError, Stopped
from llamatune.events import OnEvent, Progress, ShouldStop, ignore_event, never_stop
from llamatune.safe_reading import open_regular, read_faults

_BLOCK = 1 << 20


def verify_files(
    directory: Path,
    files: Mapping[str, tuple[int, str]],
    on_event: OnEvent = ignore_event,
    should_stop: ShouldStop = never_stop,
    recorded: str = "the manifest",
    todo: str = "fetch or make it again",
) -> None:
    """Compare every byte of ``files`` below ``directory`` with the size and SHA-256 of each, which are ``recorded``.

    Raises:
        CheckpointError: files that are missing, or of another size or content; the first is named, all are counted.
        Stopped: ``should_stop`` said so.
    """
    faults = misfits(directory, files, recorded)
    done, total = 0, sum(size for size, _ in files.values())
    for name, (size, digest) in files.items():
        if name not in faults and _digest(directory / name, done, total, on_event, should_stop) != digest:
            faults[name] = f"its content does not match {recorded}'s SHA-256"
        done += size
    if faults:
        name, what = next(iter(faults.items()))
        more = f" (and {len(faults) - 1} more: {', '.join([*faults][1:4])})" if len(faults) > 1 else ""
        raise CheckpointError(what + more, directory / name, todo)


def misfits(directory: Path, files: Mapping[str, tuple[int, str]], recorded: str = "the manifest") -> dict[str, str]:
    """The files that are missing or of another size, each with what is wrong."""
    faults = {}
    for name, (size, _) in files.items():
        path = directory / name
        if not path.exists():
            faults[name] = "missing"
        elif not path.is_file():
            faults[name] = "not a regular file"
        elif (found := path.stat().st_size) != size:
            faults[name] = f"{found:,} bytes where {recorded} says {size:,}"
    return faults


def _digest(path: Path, done: int, total: int, on_event: OnEvent, should_stop: ShouldStop) -> str:
    digest = hashlib.sha256()
    with read_faults(path), open_regular(path) as file:
        while block := file.read(_BLOCK):
            if should_stop():
                raise Stopped("stopped while verifying", path, "run the same command again")
            digest.update(block)
            done += len(block)
            on_event(Progress("bytes verified", done, total, in_bytes=True))
    return digest.hexdigest()
