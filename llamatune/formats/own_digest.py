"""A JSON file that ends with the SHA-256 of its own bytes, in which that digest stands as zeros."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.safe_reading import digest_bytes, read_bytes
from llamatune.strict_json import dump_json, parse_json_object

KEY = "sha256"
_UNKNOWN = "0" * 64


def dump_with_digest(value: dict[str, Any]) -> bytes:
    """``value`` and its digest as the last key."""
    content = dump_json({**value, KEY: _UNKNOWN})
    head, _, tail = content.rpartition(_UNKNOWN.encode())
    return head + digest_bytes(content).encode() + tail


def refuse_altered(path: Path, keys: Collection[str], max_bytes: int) -> None:
    """Raise ``CheckpointError`` if a file is not what was written with its digest; without one, only of other keys.

    ``keys``: those that it may have beside its digest.
    """
    content = read_bytes(path, max_bytes=max_bytes)
    value = parse_json_object(content, path)
    digest, others = value.get(KEY), value.keys() - {KEY, *keys}
    head, found, tail = content.rpartition(str(digest).encode())
    fits = bool(found) and digest_bytes(head + _UNKNOWN.encode() + tail) == digest
    if others or (KEY in value and not fits):
        raise CheckpointError("its content does not match its own SHA-256", path, "fetch or make it again")
