"""Expands ``~`` in a path that a user wrote."""

from __future__ import annotations

import os
from pathlib import Path

from llamatune.errors import SpecError


def expand_home(text: str) -> str:
    """``~`` and ``~user`` at the front replaced by a home directory, as a shell does where it sees a path.

    The result never begins with ``~``, so it may be expanded again: ``./~name``, an entry of that name, is made
    absolute.

    Raises:
        SpecError: no such user, or none that has a home directory.
    """
    if text.startswith("~"):
        expanded = os.path.expanduser(text)
        if expanded.startswith("~"):
            name = text.partition("/")[0]
            todo = f"write it out, or ./{name} for an entry of that name"
            raise SpecError(f"no home directory of {name}", text, todo)
        return expanded
    return os.path.abspath(text) if str(Path(text)).startswith("~") else text
