"""Sizes, durations, energy and perplexity as text, and sizes and durations parsed from text."""

from __future__ import annotations

import math
import re

from llamatune.errors import SpecError


def gibibytes(size: float) -> str:
    """``12.55 GiB``; MiB below one GiB, KiB below one MiB."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def duration(seconds: float) -> str:
    """``1:02:03``, or ``4.5 s`` below a minute."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d} min"


def clock_duration(seconds: float) -> str:
    """``0:00:05`` or ``26:02:03``, hours first, as a log has it."""
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{left:02d}"


def energy(joules: float) -> str:
    """``1.234 kWh``, or Wh below one kWh."""
    watt_hours = joules / 3600
    return f"{watt_hours / 1000:,.3f} kWh" if watt_hours >= 1000 else f"{watt_hours:.3g} Wh"


def perplexity(loss: float) -> float:
    """exp(loss), capped before it overflows, because strict JSON has no infinity."""
    return math.exp(min(loss, 700.0))


def perplexity_text(value: float, places: int = 2) -> str:
    """``12.35``, and ``1.2e+07`` from a million on, where more digits say nothing."""
    return f"{value:.{places}f}" if value < 1e6 else f"{value:.2g}"


def epoch_text(place: float, num_epochs: float) -> str:
    """The epoch, from 1, at whose end or in which ``place`` lies; of a run that ends inside one ``place``: ``0.25``."""
    if isinstance(num_epochs, int):
        return f"{min(int(place - 1e-9) + 1, num_epochs)}"
    return f"{min(place, num_epochs):.3g}"


def parse_size(text: str, where: str) -> int:
    """Bytes of ``40GiB``, ``512 MiB`` or ``24GB``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B", text)
    if match is None or not float(match[1]):
        raise SpecError(f"{text!r} is no size", where, "write it as 40GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("KMGT".index(match[2]) + 1))


_SLURM_TIME = re.compile(r"(?:([0-9]{1,4})-)?([0-9]{1,6})((?::[0-5]?[0-9]){0,2})")
_PARTS = re.compile(
    r"(?:([0-9]+(?:\.[0-9]+)?)d)?(?:([0-9]+(?:\.[0-9]+)?)h)?(?:([0-9]+(?:\.[0-9]+)?)m)?(?:([0-9]+(?:\.[0-9]+)?)s)?"
)


def slurm_seconds(text: str) -> int | None:
    """Seconds of a time as Slurm writes it: M, M:S or H:M:S; after days and a hyphen H, H:M or H:M:S. None: no time."""
    match = _SLURM_TIME.fullmatch(text)
    if match is None:
        return None
    numbers = [int(number) for number in (match[2] + match[3]).split(":")]
    units = (3600, 60, 1) if match[1] or len(numbers) == 3 else (60, 1)
    return 86_400 * int(match[1] or 0) + sum(
        number * unit for number, unit in zip(numbers, units[: len(numbers)], strict=True)
    )


def parse_duration(text: str, where: str) -> float:
    """Seconds of ``90s``, ``30m``, ``1h30m``, ``1.5h``, ``2d``, or of a time in Slurm's form, as ``1-12:00:00``."""
    match = _PARTS.fullmatch(text.replace(" ", ""))
    if match is not None and any(match.groups()):
        units = (86_400, 3600, 60, 1)
        seconds = sum(float(number) * unit for number, unit in zip(match.groups("0"), units, strict=True))
    else:
        seconds = slurm_seconds(text) or 0
    if not 0 < seconds < math.inf:
        raise SpecError(f"{text!r} is no time", where, "write it as 30m, 1h30m, 2d or 1-12:00:00")
    return seconds
