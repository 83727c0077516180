"""Errors that a user can cause, and the exit code of each.

::

    LlamatuneError
    ├── SpecError          2   the command line or the run spec
    ├── DataError          3   rows of a data file
    ├── CheckpointError    4   a model, adapter, tokenizer or checkpoint is invalid, unsafe or does not fit
    ├── EnvironmentFault   5   device, memory, disk, permission, directory in use
    │   └── OutOfMemory    5   of the device or the host
    ├── NumericsError      6   loss or gradient not finite
    ├── RequirementFailed  6   a figure of judge is not as --require wants it; the result is printed nevertheless
    ├── Stopped           75   a signal asked for a stop; the same command completes it (130 in a verb that only reads)
    └── FailedElsewhere        another rank failed; it reports its fault, and all ranks leave with its exit code

Any other exception is a bug of llamatune: exit code 1 and a traceback.
"""

from __future__ import annotations

import copyreg
from typing import Any

_LONGEST_MESSAGE = 2000


def printable(text: str, keeps: str = "") -> str:
    """``text`` as a terminal or a page may show it: quoted rows, names and paths come from elsewhere.

    Escaped is what is not printable: controls (C0, C1, DEL), bidirectional and other formats, line and paragraph
    separators, surrogates. Without ``keeps``, the characters that stay nevertheless, the text is one line.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keeps else c.encode("unicode_escape").decode() for c in text)


class LlamatuneError(Exception):
    """One line: what is wrong, where, and what to do about it. It can be pickled, and crosses processes unchanged.

    Args:
        what: the fault, in terms that the user knows.
        where: a path, ``path:line`` or key path.
        todo: the next thing to try.
    """

    exit_code = 1

    def __init__(self, what: str, where: object = None, todo: str | None = None) -> None:
        self.what, self.where, self.todo = what, where, todo
        parts = (what, None if where is None else str(where), todo)
        message = ": ".join(printable(part) for part in parts if part)
        if len(message) > _LONGEST_MESSAGE:
            message = message[:_LONGEST_MESSAGE] + " ..."
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by the constructor, whose arguments are other ones in some classes.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class SpecError(LlamatuneError):
    """The command line or the run spec is wrong."""

    exit_code = 2


class DataError(LlamatuneError):
    """Rows of a data file, or a prepared directory, cannot be used."""

    exit_code = 3


class CheckpointError(LlamatuneError):
    """A model, adapter, tokenizer or checkpoint is invalid, unsafe or does not fit."""

    exit_code = 4


class EnvironmentFault(LlamatuneError):
    """Device, memory, disk, permission, or a directory that is in use."""

    exit_code = 5


class OutOfMemory(EnvironmentFault):
    """The device or the host has too little memory."""


class NumericsError(LlamatuneError):
    """Loss or gradient is not finite."""

    exit_code = 6


class RequirementFailed(LlamatuneError):
    """A figure that was measured is not as it is required to be."""

    exit_code = 6


class Stopped(LlamatuneError):
    """A signal asked for a stop; running the same command again completes the work."""

    exit_code = 75


class FailedElsewhere(LlamatuneError):
    """Another rank failed and reports its fault: this one leaves with the same code and prints nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another rank failed with exit code {exit_code}")
        self.exit_code = exit_code
