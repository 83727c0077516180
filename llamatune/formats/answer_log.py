"""Answer log of ``evaluate`` and ``generate``: an answer a line, appended as they come, continued after a stop.

``FILE.settings.json`` beside ``FILE`` holds the settings that decide the lines. Only a job of equal settings continues
them, so a later schema of the lines needs no more than a ``schema`` among the settings; today's have none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llamatune.durable_writing import disk_faults, write_atomic
from llamatune.errors import EnvironmentFault
from llamatune.output_files import is_stream, open_stream, output_file, stream_faults
from llamatune.safe_reading import open_own
from llamatune.strict_json import dump_json, dump_json_lines, parse_json, read_json

ENTRIES_AT_ONCE = 16
"""Answers that are appended together: each append waits for the disk, and a kill loses what was not appended."""

_REMEDY = "choose another output, or pass --overwrite"


class AnswerLog:
    """A locked file of JSON lines, or a stream of them; make it with ``open_answer_log``."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._is_stream = file, path, is_stream(path)

    def entries(self) -> Iterator[Any]:
        """The values of the lines, up to the first that is cut short or not JSON; of a stream none."""
        if self._is_stream:
            return
        self._file.seek(0)
        for line in self._file:
            if not line.endswith(b"\n"):
                return
            try:
                entry = parse_json(line)
            except ValueError:
                return
            yield entry

    def keep(self, count: int) -> None:
        if self._is_stream:
            return
        with disk_faults(self._path):
            self._file.seek(0)
            for _ in range(count):
                self._file.readline()
            self._file.truncate()

    def append(self, entries: Iterable[Any]) -> None:
        """Add a line for each entry, durably."""
        lines = dump_json_lines(entries)
        with stream_faults(self._path) if self._is_stream else disk_faults(self._path, len(lines)):
            self._file.write(lines)
            self._file.flush()
            if not self._is_stream:
                os.fsync(self._file.fileno())


@contextlib.contextmanager
def open_answer_log(path: Path, settings: dict[str, Any], overwrite: bool = False) -> Iterator[AnswerLog]:
    """Lock ``path`` for a job of these settings, which are plain JSON; lines of a stopped job with equal settings stay.

    Raises:
        EnvironmentFault: without ``overwrite``, lines of other settings (named) or of none; in use; not writable.
    """
    target = output_file(path, overwrite=True)  # existing lines are checked below
    if is_stream(path):
        with open_stream(path) as stream:
            yield AnswerLog(stream, path)
        return
    beside = target.with_name(f"{target.name}.settings.json")
    # A job stopped before its first line may leave its settings; any other file of that name is the user's.
    lineless = not (target.exists() and target.stat().st_size)
    if not overwrite and lineless and beside.exists() and _read_settings(beside).keys() != settings.keys():
        raise EnvironmentFault("exists, and is not what would be written there", beside, _REMEDY)
    with disk_faults(path):
        file = os.fdopen(open_own(target, os.O_RDWR | os.O_APPEND), "a+b")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with its process
        except BlockingIOError:
            raise EnvironmentFault("in use by another process", path, "wait for it or stop it") from None
        except OSError:
            pass  # a network file system without locks; lines of two jobs at once are detected and written again
        if overwrite:
            with disk_faults(path):
                file.truncate(0)
        if file.seek(0, os.SEEK_END):
            _refuse_others(path, beside, settings)
        else:
            # Settings before lines: a file without lines belongs to no job yet.
            write_atomic(beside, dump_json(settings))
        yield AnswerLog(file, path)


def _read_settings(beside: Path) -> dict[str, Any]:
    return read_json(beside, EnvironmentFault, max_bytes=64 << 20)


def _refuse_others(path: Path, beside: Path, settings: dict[str, Any]) -> None:
    if not beside.exists():
        raise EnvironmentFault(f"not empty, and no {beside.name} says what wrote it", path, _REMEDY)
    old = _read_settings(beside)
    changed = [name for name in {**old, **settings} if old.get(name) != settings.get(name)]
    if changed:
        raise EnvironmentFault(f"written with another {', '.join(changed)}", path, _REMEDY)
