"""Files of a product that are begun before its directory is made: unnamed, so that nothing is left if it never is.

A thread copies ranges of other files to where they will lie. What it has not reached when the product's writer asks for
it, the writer copies itself.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from llamatune.durable_writing import start_writeback
from llamatune.errors import CheckpointError, Stopped
from llamatune.formats.file_range import FileRange
from llamatune.safe_reading import open_regular

_COPIED_BYTES = 64 << 20
"""Copied by one call: between two, the thread may wait for the one that imports."""

Copies = Mapping[int, FileRange]
"""What is to be copied into a file, by the position where it will lie."""


class BegunFile:
    """A file without a name; ``copying`` gives for each place and range of bytes what tells that they are there."""

    def __init__(self, descriptor: int, copying: Mapping[tuple[int, FileRange], Future[None]]) -> None:
        self._descriptor, self._copying = descriptor, copying

    def take_name(self, path: Path) -> bool:
        """Give it a name in a directory of the same file system; False: not possible here."""
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:  # with a directory, os.link follows the link in /proc
            os.link(f"/proc/self/fd/{self._descriptor}", path, src_dir_fd=directory)
        except OSError:
            return False
        finally:
            os.close(directory)
        return True

    def holds(self, position: int, source: FileRange) -> bool:
        """Whether these bytes are there, or will be in a moment; else they are the caller's to copy."""
        copying = self._copying.get((position, source))
        return copying is not None and not copying.cancel() and copying.exception() is None


@contextlib.contextmanager
def copying_ahead(directory: Path, files: Mapping[str, Copies]) -> Iterator[dict[str, BegunFile]]:
    """Copy into unnamed files on the disk of ``directory`` until the block ends; none where that is not possible."""
    stopped = threading.Event()
    with contextlib.ExitStack() as stack:
        begun: dict[str, BegunFile] = {}
        descriptors = {}
        try:
            for name in files:
                descriptors[name] = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
                stack.callback(os.close, descriptors[name])
        except (OSError, AttributeError):  # of file systems and systems without such files
            descriptors.clear()
        thread = stack.enter_context(ThreadPoolExecutor(1, "copying ahead"))
        stack.callback(thread.shutdown, cancel_futures=True)
        stack.callback(stopped.set)
        for name, descriptor in descriptors.items():
            copying = {
                (position, source): thread.submit(_copy, source, descriptor, position, stopped)
                for position, source in files[name].items()
            }
            begun[name] = BegunFile(descriptor, copying)
        yield begun


def _copy(source: FileRange, descriptor: int, position: int, stopped: threading.Event) -> None:
    done = 0
    with open_regular(source.path) as file:
        while done < source.end - source.begin:
            if stopped.is_set():
                raise Stopped("stopped while copying", source.path)
            size = min(_COPIED_BYTES, source.end - source.begin - done)
            count = os.copy_file_range(file.fileno(), descriptor, size, source.begin + done, position + done)
            if not count:
                raise CheckpointError("became shorter while it was read", source.path)
            start_writeback(descriptor, position + done, position + done + count)
            done += count
