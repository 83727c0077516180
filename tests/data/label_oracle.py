"""The label oracle: ids and targets of rows told from the libraries' offsets and from the bytes of the tokens alone.

A row is written by hand as its parts, texts and special tokens, each a target or not. A token is a target if it
contains a byte of a part that is one. Nothing here asks the program under test.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import sentencepiece
from tokenizers import Tokenizer as Library


class Part(NamedTuple):
    """A text, or a special token by its name, as the row has it."""

    text: str
    target: bool = False
    special: bool = False
    answer: bool = False
    """It begins an answer, which is encoded apart from what precedes it."""


Parts = Sequence[Part]
Labelled = tuple[list[int], list[int]]
Pieces = list[tuple[int, int, int]]
"""Ids, each with its first byte in the text and the one after its last."""


class Reference(Protocol):
    """A tokenizer's own library."""

    before_a_text: bytes
    """What the tokens of a text spell before its own first byte."""
    normalises: bool

    def special(self, name: str) -> int: ...
    def pieces(self, text: str, begins: bool) -> Pieces:
        """The pieces of ``text``, with which a text between special tokens begins or goes on."""

    def spelling(self, token: int) -> bytes: ...


class SentencePieceReference:
    """The `sentencepiece` library, which gives offsets in bytes."""

    before_a_text = b" "
    normalises = False

    def __init__(self, path: Path) -> None:
        self._library = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def special(self, name: str) -> int:
        token = int(self._library.piece_to_id(name))
        assert self._library.is_control(token)
        return token

    def pieces(self, text: str, begins: bool) -> Pieces:
        before = "" if begins else "\n"  # which is a byte here, and so merges with nothing
        encoded = self._library.encode(before + text, return_type="proto").pieces
        first, skipped = len(before), 0 if begins else 2
        assert begins or encoded[1].piece == "<0x0A>"
        return [(piece.id, piece.begin - first, piece.end - first) for piece in encoded[skipped:]]

    def spelling(self, token: int) -> bytes:
        piece = str(self._library.id_to_piece(token))
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()


class JsonReference:
    """The `tokenizers` library, which gives offsets in characters."""

    before_a_text = b""

    def __init__(self, directory: Path) -> None:
        self._library = Library.from_file(str(directory / "tokenizer.json"))
        self._library.encode_special_tokens = True  # what looks like one in a text is text
        self.normalises = self._library.normalizer is not None

    def special(self, name: str) -> int:
        token = self._library.token_to_id(name)
        assert token is not None
        return int(token)

    def pieces(self, text: str, begins: bool) -> Pieces:
        starts = list(itertools.accumulate((len(character.encode()) for character in text), initial=0))
        encoding = self._library.encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        return [(token, starts[first], starts[last]) for token, (first, last) in spans]

    def spelling(self, token: int) -> bytes:
        return bytes(_BYTES[character] for character in str(self._library.id_to_token(token)))


def _byte_level_bytes() -> dict[str, int]:
    """GPT-2's spelling: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_level_bytes()


def told_by_offsets(reference: Reference, parts: Parts) -> Labelled:
    """Ids and loss mask: between two special tokens what precedes an answer is encoded in one call, and the answer."""
    ids, mask = list[int](), list[int]()
    begins = True
    answers = itertools.accumulate(part.answer for part in parts)
    for (special, _), run in itertools.groupby(
        zip(parts, answers, strict=True), key=lambda pair: (pair[0].special, pair[1])
    ):
        some = [part for part, _ in run]
        if special:
            ids += [reference.special(part.text) for part in some]
            mask += [int(part.target) for part in some]
            begins = True
            continue
        flags = [part.target for part in some for _ in part.text.encode()]
        for token, first, last in reference.pieces("".join(part.text for part in some), begins):
            ids.append(token)
            mask.append(int(any(flags[first : max(last, first + 1)])))  # a byte's or a prefix's own span is empty
        begins = begins and not flags
    return ids, untrained_first(mask)


def told_by_bytes(reference: Reference, ids: Sequence[int], parts: Parts) -> list[int]:
    """The loss mask of ``ids``, whose bytes, one token after the other, must be those of ``parts``."""
    mask, left = list[int](), list(ids)
    for special, run in itertools.groupby(parts, key=lambda part: part.special):
        some = list(run)
        if special:
            for part in some:
                assert left.pop(0) == reference.special(part.text)
                mask.append(int(part.target))
            continue
        content = [(byte, part.target) for part in some for byte in _bytes(reference, part.text)]
        content = [(byte, False) for byte in reference.before_a_text if content] + content
        at = 0
        while at < len(content):
            spelled = reference.spelling(left.pop(0))
            own = content[at : at + len(spelled)]
            assert spelled == bytes(byte for byte, _ in own)
            if at == 0 and spelled == reference.before_a_text:
                own = content[: len(spelled) + 1]  # alone, it stands where the text begins
            mask.append(int(any(target for _, target in own)))
            at += len(spelled)
    assert not left
    return untrained_first(mask)


def untrained_first(mask: list[int]) -> list[int]:
    """Nothing precedes the first token, so that nothing can predict it."""
    return [0, *mask[1:]]


def _bytes(reference: Reference, text: str) -> bytes:
    return (text.replace("▁", " ") if reference.before_a_text else text).encode()


def spelled(reference: Reference, ids: Sequence[int]) -> bytes:
    """What the tokens of a text spell, one after the other."""
    return b"".join(map(reference.spelling, ids))


def in_bytes(reference: Reference, text: str) -> bytes:
    """What the tokens of ``text`` must spell."""
    return reference.before_a_text + _bytes(reference, text) if text else b""
