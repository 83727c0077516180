"""Text from the command line, standard input and prompt files, decoded as UTF-8."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from llamatune.errors import DataError, SpecError

if TYPE_CHECKING:
    pass

_LONGEST_INPUT = 16 << 20


def as_utf8(text: str, where: str) -> str:
    """An argument as UTF-8 text, also in a locale that decoded it as something else."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as fault:
        raise SpecError(f"not UTF-8 at byte {fault.start}", where) from None


def read_standard_input() -> str:
    """All of standard input, which must be UTF-8 and end within 16 MiB."""
    stream = getattr(sys.stdin, "buffer", None)
    raw = sys.stdin.read(_LONGEST_INPUT + 1).encode() if stream is None else stream.read(_LONGEST_INPUT + 1)
    if len(raw) > _LONGEST_INPUT:
        raise DataError(f"more than {_LONGEST_INPUT:,} bytes", "standard input", "pass prompts with --prompt-file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise DataError(f"not UTF-8 at byte {fault.start}", "standard input") from None
