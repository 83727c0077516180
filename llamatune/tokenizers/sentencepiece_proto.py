"""The protocol buffer of a SentencePiece model: what determines ids, taken from its bytes, and the bytes of a new one.

Field numbers are those of ``sentencepiece_model.proto``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE, UNIGRAM = 2, 1
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5
_LONGEST_VARINT = 10
"""Bytes of a number of 64 bits."""


@dataclass(frozen=True)
class Piece:
    """A piece of the vocabulary; ``kind`` is one of the six above."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class PieceModel:
    """A model. ``charsmap`` is the compiled normalisation, empty: none. The names are of its special pieces."""

    pieces: Sequence[Piece]
    kind: int = BPE
    unknown: str = "<unk>"
    bos: str = "<s>"
    eos: str = "</s>"
    charsmap: bytes = b""
    dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    escape_whitespaces: bool = True
    spaces_are_suffixes: bool = False


def read_pieces(model: bytes) -> PieceModel:
    """The model in bytes that ``read_checked`` has checked.

    ``ValueError``: fields that the library passes over, or takes otherwise, are broken.
    """
    pieces, trainer, normalizer = list[Piece](), dict[int, bytes | int](), dict[int, bytes | int]()
    for field, value in _fields(model):
        if isinstance(value, int):
            continue
        if field == 1:
            facts = dict(_fields(value))
            text, score = _bytes(facts, 1), _bytes(facts, 2) or bytes(4)
            if len(score) != 4:
                raise ValueError(f"the score of piece {len(pieces)} has {len(score)} bytes")
            pieces.append(Piece(text.decode(), struct.unpack("<f", score)[0], _number(facts, 3, NORMAL)))
        elif field == 2:
            trainer |= dict(_fields(value))
        elif field == 3:
            normalizer |= dict(_fields(value))
    return PieceModel(
        pieces,
        _number(trainer, 3, UNIGRAM),
        (_bytes(trainer, 45) or b"<unk>").decode(),
        (_bytes(trainer, 46) or b"<s>").decode(),
        (_bytes(trainer, 47) or b"</s>").decode(),
        _bytes(normalizer, 2),
        bool(_number(normalizer, 3, 1)),
        bool(_number(normalizer, 4, 1)),
        bool(_number(normalizer, 5, 1)),
        bool(_number(trainer, 24, 0)),
    )


def written_pieces(model: PieceModel) -> bytes:
    """The bytes of a ``tokenizer.model``."""
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    byte_fallback = any(piece.kind == BYTE for piece in model.pieces)
    trainer = [
        _put(3, model.kind), _put(4, len(model.pieces)), _put(24, model.spaces_are_suffixes), _put(35, byte_fallback),
        *(_put(40 + n, ids.get(text, -1)) for n, text in enumerate((model.unknown, model.bos, model.eos))),
        *(_put(45 + n, text.encode()) for n, text in enumerate((model.unknown, model.bos, model.eos))),
    ]  # fmt: skip
    normalizer = [
        _put(1, b"identity" if not model.charsmap else b"precompiled"), _put(2, model.charsmap),
        _put(3, model.dummy_prefix), _put(4, model.remove_extra_whitespaces), _put(5, model.escape_whitespaces),
    ]  # fmt: skip
    pieces = (
        _put(1, piece.text.encode()) + _tag(2, _FIXED_32) + struct.pack("<f", piece.score) + _put(3, piece.kind)
        for piece in model.pieces
    )
    return b"".join([*(_put(1, piece) for piece in pieces), _put(2, b"".join(trainer)), _put(3, b"".join(normalizer))])


def _fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a message by number: a varint as a number, anything else as its bytes; ``ValueError`` if broken."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = 0
        for place, byte in enumerate(message[position : position + _LONGEST_VARINT]):
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                position += place + 1
                return value
        raise ValueError(f"no number at byte {position} of a message")

    while position < len(message):
        tag = varint()
        field, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            yield field, varint()
            continue
        size = varint() if wire == _BYTES else {_FIXED_64: 8, _FIXED_32: 4}.get(wire, len(message))
        if size > len(message) - position:
            raise ValueError(f"field {field} is cut off, or of the unknown kind {wire}")
        yield field, message[position : position + size]
        position += size


def _number(facts: dict[int, bytes | int], field: int, default: int) -> int:
    value = facts.get(field, default)
    return value if isinstance(value, int) else default


def _bytes(facts: dict[int, bytes | int], field: int) -> bytes:
    value = facts.get(field, b"")
    return value if isinstance(value, bytes) else b""


def _put(field: int, value: bytes | int) -> bytes:
    if isinstance(value, bytes):
        return _tag(field, _BYTES) + _varint(len(value)) + value
    return _tag(field, _VARINT) + _varint(int(value) & 0xFFFFFFFFFFFFFFFF)


def _tag(field: int, wire: int) -> bytes:
    return _varint(field << 3 | wire)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
