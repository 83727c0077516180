"""The oldest release of a package that we run on, enforced where it is used: installers can be overruled."""

from __future__ import annotations

from llamatune.errors import EnvironmentFault

OLDEST = {"torch": "2.10", "sentencepiece": "0.2.3"}
"""Earlier ones have holes in loading (torch) or crash on malformed models (sentencepiece); as in ``pyproject.toml``."""


def require_version(package: str, found: str) -> None:
    """Raise ``EnvironmentFault`` if version ``found`` of ``package`` is older than we run on."""
    oldest = OLDEST[package]
    if _numbers(found) < _numbers(oldest):
        raise EnvironmentFault(
            f"{package} {found} is too old: {oldest} or later is needed", None, f"pip install '{package}>={oldest}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of 2.13.0+cpu, (2, 11) of 2.11rc1."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)
