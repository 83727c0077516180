"""JSON read and written strictly: no NaN, no duplicate keys, no lone surrogates, no endless nesting."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError, LlamatuneError
from llamatune.safe_reading import read_bytes


def parse_json(text: str | bytes) -> Any:
    """Strict JSON: ``ValueError`` on NaN, duplicate keys, lone surrogates, endless nesting or endless digits."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} appears twice")
        return made

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=object_of, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a lone surrogate, which is no character") from None
    return value


def read_json(path: Path, error: type[LlamatuneError] = CheckpointError, max_bytes: int = 1 << 20) -> dict[str, Any]:
    """A JSON object from a bounded regular file."""
    return parse_json_object(read_bytes(path, error, max_bytes), path, error)


def parse_json_object(text: bytes, where: Path, error: type[LlamatuneError] = CheckpointError) -> dict[str, Any]:
    """The JSON object that a file holds; ``error`` names the file."""
    try:
        value = parse_json(text)
    except ValueError as fault:
        raise error(f"not valid JSON: {fault}", where) from None
    if not isinstance(value, dict):
        raise error("not a JSON object", where)
    return value


def dump_json(value: Any) -> bytes:
    """Indented JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """A new file of indented JSON, synced. Not atomic: for staging directories."""
    with writing(path) as file:
        file.write(dump_json(value))


def dump_json_lines(values: Iterable[Any]) -> bytes:
    """One JSON value a line."""
    return "".join(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values).encode()
