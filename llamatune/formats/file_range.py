"""``FileRange``: bytes of a file that are to be copied."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileRange:
    """Bytes ``begin:end`` of a file, and their CRC-32 where it is known."""

    path: Path
    begin: int
    end: int
    crc: int | None = None
