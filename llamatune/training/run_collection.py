"""A directory of several runs, or of the cells of a benchmark: claiming it for a new or a continued one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from llamatune.durable_writing import probe_writable, refuse_occupied
from llamatune.training.run_directory import is_occupied, move_aside
from llamatune.training.run_lock import LOCK, run_lock


def refuse_other(output: Path, folder: str, overwrite: bool) -> None:
    """Raise unless ``output`` is empty, or holds ``folder`` from an earlier call, or may be moved aside."""
    if not overwrite and is_occupied(output) and not ((output / LOCK).is_file() and (output / folder).is_dir()):
        refuse_occupied(output, overwrite=False)


@contextlib.contextmanager
def claimed(output: Path, folder: str, overwrite: bool) -> Iterator[None]:
    """Hold the directory and its ``folder``, which are made, or with ``overwrite`` made anew."""
    if overwrite and is_occupied(output):
        with run_lock(output):
            pass
        move_aside(output)
    else:
        refuse_other(output, folder, overwrite)
    probe_writable(output)
    with run_lock(output):
        (output / folder).mkdir(exist_ok=True)
        yield
