"""Topics: kinds of errors, each with the words by which its messages are known, a meaning, an example and a remedy."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """``pattern`` matches what every message of the kind says; ``code`` is the exit code that it ends with."""

    name: str
    code: int
    pattern: re.Pattern[str]
    meaning: str
    example: str
    todo: str


def topic(name: str, code: int, words: str, meaning: str, example: str, todo: str) -> Topic:
    """A topic whose messages match the regular expression ``words``, in any case."""
    return Topic(name, code, re.compile(words, re.IGNORECASE), meaning, example, todo)
