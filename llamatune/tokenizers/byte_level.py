"""Byte-level vocabularies: each byte of UTF-8 is spelled as a printable character, as in GPT-2 (``Ġ`` is a space)."""

from __future__ import annotations

import re

_PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
CHARACTERS = {byte: chr(byte) for byte in _PRINTED} | {byte: chr(256 + n) for n, byte in enumerate(_OTHERS)}
"""The character of each byte: itself if it is printed in Latin-1, or else the next one from U+0100."""

UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 256)}
"""The bytes that occur in UTF-8."""

_SPELLING = str.maketrans({byte: CHARACTERS[byte] for byte in range(256)})
_BYTES = {character: byte for byte, character in CHARACTERS.items()}


def spelled(token: bytes) -> str:
    """The token as a byte-level vocabulary spells it."""
    return token.decode("latin-1").translate(_SPELLING)


def bytes_of(text: str) -> bytes:
    """The bytes that a spelled token stands for; of any other text its UTF-8."""
    try:
        return bytes([_BYTES[character] for character in text])
    except KeyError:
        return text.encode()


def readable(text: str) -> str:
    """A spelled token to read: its text with ``▁`` for spaces, or ``<0xE2>`` for each byte that is no character."""
    shown = bytes_of(text).decode("utf-8", "surrogateescape").replace(" ", "▁")
    return re.sub("[\udc80-\udcff]", lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", shown)
