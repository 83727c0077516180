"""GPUs by name: compute capability, and memory as the vendor states it, in bytes of 10^9. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llamatune.errors import SpecError
from llamatune.shapes.capabilities import Capability


@dataclass(frozen=True)
class KnownGpu:
    """``memory_bytes`` None: only the capability is known."""

    capability: Capability
    memory_bytes: int | None


def _gpu(major: int, minor: int, gigabytes: int) -> KnownGpu:
    return KnownGpu((major, minor), gigabytes * 10**9)


KNOWN_GPUS = {
    "v100": _gpu(7, 0, 16),
    "v100-32gb": _gpu(7, 0, 32),
    "t4": _gpu(7, 5, 16),
    "rtx-2080-ti": _gpu(7, 5, 11),
    "a100": _gpu(8, 0, 40),
    "a100-80gb": _gpu(8, 0, 80),
    "a30": _gpu(8, 0, 24),
    "a10": _gpu(8, 6, 24),
    "a40": _gpu(8, 6, 48),
    "rtx-a6000": _gpu(8, 6, 48),
    "rtx-3090": _gpu(8, 6, 24),
    "l4": _gpu(8, 9, 24),
    "l40s": _gpu(8, 9, 48),
    "rtx-4090": _gpu(8, 9, 24),
    "h100": _gpu(9, 0, 80),
    "h200": _gpu(9, 0, 141),
    "b200": _gpu(10, 0, 180),
    "rtx-5090": _gpu(12, 0, 32),
}


def known_gpu(name: str) -> KnownGpu:
    """A GPU by its name, or by its compute capability as ``8.6``."""
    if match := re.fullmatch(r"(\d{1,2})\.(\d)", name, re.ASCII):
        return KnownGpu((int(match[1]), int(match[2])), None)
    plain = re.sub(r"[ _]+", "-", name.strip().lower())
    if plain not in KNOWN_GPUS:
        todo = f"give one of {', '.join(KNOWN_GPUS)}, cpu, or the compute capability as 8.6"
        raise SpecError(f"no GPU is called {name!r} here", "--gpu", todo)
    return KNOWN_GPUS[plain]
