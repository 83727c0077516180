"""Expands ``~`` and ``$VARIABLE`` in a path that a user wrote."""

from __future__ import annotations

import os
import re
from pathlib import Path

from llamatune.errors import SpecError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{(])")
"""``$NAME``, ``${NAME}``, or what begins something else that a shell would replace."""


def expand_path(text: str, variables: bool = True) -> str:
    """``$NAME`` and ``${NAME}`` replaced from the environment, then ``~`` and ``~user`` at the front, as a shell does.

    The result may be expanded again: it never begins with ``~`` (``./~name``, an entry of that name, is made absolute),
    and holds no variable, unless an entry of that very name exists, or a directory whose name no variable could be:
    then ``$`` has no meaning. Without ``variables`` it never has one.

    Raises:
        SpecError: a NUL, no such variable or user, one without a value or home directory, or another form of ``$``.
    """
    if "\0" in text:
        raise SpecError("a path holds no NUL character", text, "write it without")
    if variables and _VARIABLE.search(text) and not _exists(text):
        text = _with_variables(text)
    if text.startswith("~"):
        expanded = os.path.expanduser(text)
        if expanded.startswith("~"):
            name = text.partition("/")[0]
            todo = f"write it out, or ./{name} for an entry of that name"
            raise SpecError(f"no home directory of {name}", text, todo)
        return expanded
    return os.path.abspath(text) if str(Path(text)).startswith("~") else text


def _with_variables(text: str) -> str:
    parts = text.split("/")
    for number, part in enumerate(parts):
        try:
            expanded = _VARIABLE.sub(lambda found: _value(found, text), part)
            if _VARIABLE.search(expanded):
                raise SpecError("a variable in it holds another variable", text, "write the path out")
            parts[number] = expanded
        except SpecError:
            if not _exists("/".join(parts[: number + 1])):
                raise
    return "/".join(parts)


def _value(found: re.Match[str], text: str) -> str:
    name = found[1] or found[2]
    if name is None:
        raise SpecError(f"{found[0]} is for a shell", text, "only $NAME and ${NAME} are expanded; write it out")
    if not (value := os.environ.get(name)):
        fault = "is not set" if value is None else "is empty"
        raise SpecError(f"the variable {name} {fault}", text, "set it, or write the path out")
    return value


def _exists(text: str) -> bool:
    return os.path.lexists(os.path.expanduser(text))
