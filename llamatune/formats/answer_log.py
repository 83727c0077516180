"""A file of JSON lines that a job appends to while it works, and goes on with after it was stopped anywhere.

Beside ``FILE`` stands ``FILE.settings.json``: what decides the lines. Only a job of equal settings goes on with them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llamatune.durable_writing import disk_fault, output_file, write_atomic
from llamatune.errors import EnvironmentFault
from llamatune.strict_json import dump_json, dump_json_lines, parse_json, read_json


class Journal:
    """A locked file of JSON lines; make it with ``open_journal``."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path

    def entries(self) -> Iterator[Any]:
        """What the lines hold, up to the first that is cut short or no JSON."""
        self._file.seek(0)
        for line in self._file:
            try:
                entry = parse_json(line)
            except ValueError:
                return
            if not line.endswith(b"\n"):
                return
            yield entry

    def keep(self, count: int) -> None:
        """Drop all but the first ``count`` lines."""
        self._file.seek(0)
        for _ in range(count):
            self._file.readline()
        self._file.truncate()

    def append(self, entries: Iterable[Any]) -> None:
        """Add a line for each entry, durably."""
        lines = dump_json_lines(entries)
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as fault:
            raise disk_fault(fault, self._path, len(lines)) from fault


@contextlib.contextmanager
def open_journal(path: Path, settings: dict[str, Any], overwrite: bool = False) -> Iterator[Journal]:
    """Lock ``path`` for a job of these settings, which are plain JSON, and whoever left it there unfinished goes on.

    Raises:
        EnvironmentFault: lines of other settings (named) or of no journal, and no ``overwrite``; in use; not writable.
    """
    target = output_file(path, overwrite=True)  # whose lines they are is asked below
    beside = target.with_name(f"{target.name}.settings.json")
    if not overwrite and beside.exists() and not (target.exists() and target.stat().st_size):
        _refuse_other_kind(beside, settings)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(target.open("a+b"))
        except OSError as fault:
            raise disk_fault(fault, path) from fault
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with its process
        except BlockingIOError:
            raise EnvironmentFault("in use by another process", path, "wait for it or stop it") from None
        except OSError:
            pass  # a network file system without locks; lines that two wrote at once are found and written again
        if overwrite:
            file.truncate(0)
        if file.seek(0, os.SEEK_END):
            _refuse_others(path, beside, settings)
        else:
            # The lines come after what they mean: an empty file is anybody's.
            write_atomic(beside, dump_json(settings))
        yield Journal(file, path)


_TODO = "choose another output, or pass --overwrite"


def _refuse_other_kind(beside: Path, settings: dict[str, Any]) -> None:
    """A journal that was stopped before its first line may leave its settings; any other file there is the user's."""
    if read_json(beside, EnvironmentFault, 64 << 20).keys() != settings.keys():
        raise EnvironmentFault("exists, and is not what would be written there", beside, _TODO)


def _refuse_others(path: Path, beside: Path, settings: dict[str, Any]) -> None:
    if not beside.exists():
        raise EnvironmentFault(f"not empty, and no {beside.name} says what wrote it", path, _TODO)
    old = read_json(beside, EnvironmentFault, 64 << 20)
    changed = [name for name in {**old, **settings} if old.get(name) != settings.get(name)]
    if changed:
        raise EnvironmentFault(f"written with another {', '.join(changed)}", path, _TODO)
