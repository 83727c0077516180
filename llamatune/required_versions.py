"""Required versions of torch, sentencepiece and jinja2, checked at run time as well: an installer can be overruled."""

from __future__ import annotations

import re

from llamatune.errors import EnvironmentFault

OLDEST = {"torch": "2.10", "sentencepiece": "0.2.3", "jinja2": "3.1.6"}
"""Older torch loads files unsafely; older sentencepiece crashes on malformed models; the sandbox of an older jinja2 has
holes. As in ``pyproject.toml``."""


def require_version(package: str, found: str) -> None:
    """Raise ``EnvironmentFault`` if version ``found`` of ``package`` is older than the required one."""
    oldest = OLDEST[package]
    if not at_least(found, oldest):
        raise EnvironmentFault(
            f"{package} {found} is too old: {oldest} or later is needed", None, f"pip install '{package}>={oldest}'"
        )


def at_least(found: str, version: str) -> bool:
    """Whether version ``found`` of a package is ``version`` or later."""
    return _release(found) >= _release(version)


def _release(version: str) -> list[int]:
    """[2, 13, 0] of 2.13.0+cpu, [2, 11] of 2.11rc1."""
    return [int(number) for number in re.split(r"[^\d.]", version)[0].split(".") if number]
