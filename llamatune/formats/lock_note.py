"""The note in the lock of a run directory: which process holds it, since when, and its heartbeat."""

from __future__ import annotations

import json
from typing import Annotated

from pydantic import Field

from llamatune.formats.file_schema import Count, FileSchema
from llamatune.strict_json import parse_json

LARGEST_NOTE = 4096
"""Bytes; a host's name has 255 at most."""
_Text = Annotated[str, Field(max_length=300)]


class LockNote(FileSchema):
    """``claim`` and ``beat`` are those of file systems without locks."""

    host: _Text
    pid: Annotated[int, Field(ge=1, lt=1 << 31)]
    started: _Text
    claim: _Text | None = None
    beat: Count | None = None

    def dump(self) -> bytes:
        return json.dumps(self.model_dump(exclude_none=True)).encode()


def parse_note(content: bytes) -> LockNote | None:
    """The note in a lock; None: none that fits, as in a lock that is free or is just being written."""
    try:
        return LockNote.model_validate(parse_json(content))
    except ValueError:  # pydantic's ValidationError is one
        return None
