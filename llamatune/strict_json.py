"""JSON read and written strictly: finite numbers, unique keys, no lone surrogates, no endless nesting; typed fields."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError, LlamatuneError
from llamatune.safe_reading import read_bytes

T = TypeVar("T")

_LONGEST_VALUE = 1000
"""Of one that a message quotes: the message's end, which says why, still fits."""


_PLAIN = {
    "Expecting value": "a value is expected",
    "Expecting property name enclosed in double quotes": "a key in double quotes is expected",
    "Expecting ':' delimiter": "a colon is expected",
    "Expecting ',' delimiter": "a comma is expected",
    "Unterminated string starting at": "a text that does not end, which begins",
    "Invalid control character at": "a control character within a text",
    "Invalid \\escape": "an unknown escape",
    "Invalid \\uXXXX escape": "an unfinished escape of a character",
    "Extra data": "something follows the value",
    "Illegal trailing comma before end of object": "a comma before the end",
    "Illegal trailing comma before end of array": "a comma before the end",
}
"""What Python's parser says, which some of its versions go on with a colon, in plain words."""


class SyntaxFault(ValueError):
    """A text is no JSON: why, and where, counted from 1."""

    def __init__(self, why: str, line: int, column: int) -> None:
        self.why, self.line, self.column = why, line, column
        super().__init__(f"{why} at line {line}, column {column}")


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key in counts if counts[key] > 1)
        raise ValueError(f"the key {twice[:80]!r} appears twice")
    return made


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:80]} is beyond the range of numbers")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object_of, parse_constant=_refuse, parse_float=_finite)
"""Made once: of a short row, making it takes as long as decoding."""


def parse_json(text: str | bytes) -> Any:
    """Strict JSON: ``ValueError`` on NaN, infinity, duplicate keys, lone surrogates, endless nesting or digits.

    The error is in plain words; one of syntax is a ``SyntaxFault``.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as fault:
            raise ValueError(f"not UTF-8 at byte {fault.start}") from None
    if text.startswith("\ufeff"):
        raise SyntaxFault("a byte order mark within the text", 1, 1)
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as fault:
        raise SyntaxFault(_plain(fault.msg), fault.lineno, fault.colno) from None
    except ValueError as fault:
        if "int_max_str_digits" in str(fault):
            raise ValueError("a whole number of thousands of digits") from None
        raise
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a lone surrogate, which is no character") from None
    return value


def _plain(message: str) -> str:
    return next((plain for theirs, plain in _PLAIN.items() if message.startswith(theirs)), message)


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


@dataclass(frozen=True)
class JsonFields:
    """A JSON object in the file at ``path``; its values are taken out with their types checked."""

    path: Path
    raw: dict[str, Any]

    def refuse(self, key: str, why: str) -> NoReturn:
        value = self.raw.get(key)
        stated = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if len(stated) > _LONGEST_VALUE:
            stated = f"{stated[:_LONGEST_VALUE]} ..."
        raise CheckpointError(f"{key} is {stated}", self.path, why)

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

    def build(self, kind: Callable[..., T], **values: Any) -> T:
        """An object of these values; an error of its own checks names the file."""
        try:
            return kind(**values)
        except CheckpointError as fault:
            raise CheckpointError(fault.what, self.path, fault.todo) from None


def json_line(value: Any) -> str:
    """One line of JSON, for stdout and files that are shown on a terminal: what is not printable is escaped."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if not line.isprintable():  # within strings alone
        line = "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
    return line + "\n"


def dump_json(value: Any) -> bytes:
    """Indented JSON with a final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """A new file of indented JSON, synced. Not atomic: for staging directories."""
    with writing(path) as file:
        file.write(dump_json(value))


def dump_json_lines(values: Iterable[Any]) -> bytes:
    """One JSON value a line, as ``json_line``."""
    return "".join(map(json_line, values)).encode()
