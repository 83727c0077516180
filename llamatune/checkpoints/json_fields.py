"""The fields of a model's JSON configuration, taken with their types checked. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.shapes.config import LlamaConfig
from llamatune.strict_json import read_json


class JsonFields:
    """A JSON object whose values are taken out with their types checked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = read_json(path)

    def refuse(self, key: str, why: str) -> None:
        raise CheckpointError(f"{key} is {str(self.raw.get(key))[:80]!r}", self.path, why)

    def expect(self, key: str, value: object) -> None:
        given = self.raw.get(key)
        if given is not None and (given != value or type(given) is not type(value)):
            self.refuse(key, f"only {value!r} is supported: anything else computes another model")

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._take(key, default, int, self.raw))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._take(key, default, bool, self.raw))

    def number(self, key: str, default: float, source: dict[str, Any] | None = None) -> float:
        source = self.raw if source is None else source
        if type(source.get(key)) is int and abs(source[key]) < 1 << 60:
            source = {key: float(source[key])}
        value = float(self._take(key, default, float, source))
        if not math.isfinite(value):
            self.refuse(key, "a finite number is expected")
        return value

    def _take(self, key: str, default: Any, kind: type, source: dict[str, Any]) -> Any:
        value = source.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise CheckpointError(f"has no {key}", self.path, "fetch it again")
        if type(value) is not kind:
            names = {int: "a whole number", float: "a number", bool: "true or false"}
            raise CheckpointError(f"{key} is {str(value)[:80]!r}", self.path, f"{names[kind]} is expected")
        return value

    def build(self, **values: Any) -> LlamaConfig:
        try:
            return LlamaConfig(**values)
        except CheckpointError as fault:
            raise CheckpointError(fault.what, self.path, fault.todo) from None
