"""What the command line and standard input hand over, made text."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llamatune.errors import DataError, SpecError

if TYPE_CHECKING:
    from llamatune.inference.answer import Prompt

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


def given_prompts(prompt: list[str] | None, prompt_file: Path | None) -> list[Prompt]:
    """What ``--prompt`` or ``--prompt-file`` hold; both together are refused, neither is no prompt."""
    if prompt and prompt_file:
        raise SpecError("--prompt and --prompt-file exclude each other")
    if prompt_file is not None:
        from llamatune.inference.answer import read_prompts

        return read_prompts(prompt_file)
    return [as_utf8(text, "--prompt") for text in prompt or []]
