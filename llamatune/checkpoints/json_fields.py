"""The fields of a model's JSON configuration, taken with their types checked. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from llamatune.errors import CheckpointError
from llamatune.shapes.config import LlamaConfig

T = TypeVar("T")


@dataclass(frozen=True)
class JsonFields:
    """A JSON object in the file at ``path``, whose values are taken out with their types checked."""

    path: Path
    raw: dict[str, Any]

    def refuse(self, key: str, why: str) -> NoReturn:
        raise CheckpointError(f"{key} is {str(self.raw.get(key))[:80]!r}", self.path, why)

    def expect(self, key: str, value: object) -> None:
        given = self.raw.get(key)
        if given is not None and (given != value or type(given) is not type(value)):
            self.refuse(key, f"only {value!r} is supported: anything else computes another model")

    def integer(self, key: str, default: int | None = None) -> int:
        return self._take(key, default, int, "a whole number is expected")

    def flag(self, key: str, default: bool) -> bool:
        return self._take(key, default, bool, "true or false is expected")

    def number(self, key: str, default: float) -> float:
        whole = self.raw.get(key)
        if type(whole) is int and abs(whole) < 1 << 60:
            return float(whole)
        value = self._take(key, default, float, "a number is expected")
        if not math.isfinite(value):
            self.refuse(key, "a finite number is expected")
        return value

    def _take(self, key: str, default: T | None, kind: type[T], why: str) -> T:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"has no {key}", self.path, "fetch it again")
        if type(value) is not kind:
            self.refuse(key, why)
        return value

    def build(self, **values: Any) -> LlamaConfig:
        try:
            return LlamaConfig(**values)
        except CheckpointError as fault:
            raise CheckpointError(fault.what, self.path, fault.todo) from None
