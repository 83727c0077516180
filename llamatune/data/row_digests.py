"""Digests of rows, 8 bytes each: equal rows, and rows that differ in white space and case alone, have equal digests."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llamatune.data.row_json import Row

_BLANKS = " \t\n\v\f\r"
_REMOVED = _BLANKS.encode()
_PARTS = 64


def texts_of(row: Row) -> str:
    """All texts of a row that are not empty, with a NUL, which no row has, between two."""
    texts = [text for _, text in sorted(row.fields.items()) if text]
    for turn in row.turns:
        texts += filter(None, turn)
    if row.irregular is not None:
        texts += filter(None, _texts_in([row.irregular.messages, row.irregular.answer, row.irregular.tools]))
    return "\0".join([*texts, row.completion] if row.completion else texts)


def _texts_in(value: Any) -> Iterator[str]:
    """All values in a JSON value, as text."""
    if isinstance(value, Mapping):
        value = value.values()
    elif isinstance(value, str) or not isinstance(value, list | tuple):
        yield str(value)
        return
    for part in value:
        yield from _texts_in(part)


def exact_digest(row: Row) -> int:
    """Of all that a row says, and of what may be trained."""
    further = [part for part in (row.trained, row.irregular) if part]
    content = repr((sorted(row.fields.items()), row.turns, row.completion, *further))
    return _digest(content.encode())


def loose_digest(texts: str) -> int:
    """Of ``texts_of`` a row, without white space and case."""
    if not texts.isascii():
        texts = "".join(texts.split())
    return _digest(texts.casefold().encode().translate(None, _REMOVED))


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def count_distinct(digests: Iterable[int]) -> int:
    """The number of different digests. A set of all would need ten times the memory of an array."""
    return sum(len(set(part)) for part in _parts(digests))


def count_shared(digests: Iterable[int], others: Iterable[int]) -> int:
    """How many of ``digests`` are among ``others``."""
    parts = zip(_parts(digests), _parts(others), strict=True)
    return sum(sum(map(set(other).__contains__, own)) for own, other in parts)


def _parts(digests: Iterable[int]) -> Iterator[array[int]]:
    """The digests in parts, equal ones in the same."""
    parts = [array("Q") for _ in range(_PARTS)]
    adders = [part.append for part in parts]
    for digest in digests:
        adders[digest % _PARTS](digest)
    yield from parts
