"""Errors of pydantic's types in plain words: what a value should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PLAIN = {
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "dict_type": "should be a mapping of keys to values",
    "model_type": "should be a mapping of keys to values",
    "model_attributes_type": "should be a mapping of keys to values",
    "invalid_key": "keys should be text",
}
"""By the type of the error."""


def plain_words(error: Mapping[str, Any]) -> str:
    """``should be a list``, of an error of ``ValidationError.errors``."""
    if error["type"] == "string_pattern_mismatch":
        return "should be 64 hexadecimal digits" if "a-f" in error["ctx"]["pattern"] else "should be a whole number"
    message = _PLAIN.get(error["type"]) or str(error["msg"]).replace(" after validation", "")
    _, begin, rest = message.partition("should ")
    return begin + rest if begin else message[:1].lower() + message[1:]
