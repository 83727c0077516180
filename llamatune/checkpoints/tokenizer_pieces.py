"""The number of pieces in a SentencePiece model. No torch.

Counted in the file and not by the library, whose loader can crash on a malformed model and would need a process of its
own; a protobuf parser would be one more dependency for one number.
"""

from __future__ import annotations

from pathlib import Path

from llamatune.errors import CheckpointError
from llamatune.safe_reading import open_regular

_LARGEST_TOKENIZER = 64 << 20


def count_tokenizer_pieces(path: Path) -> int:
    """The pieces of a SentencePiece model: field 1 of its protobuf message, ModelProto."""
    with open_regular(path, max_bytes=_LARGEST_TOKENIZER) as file:
        data = file.read()
    pieces = position = 0
    try:
        while position < len(data):
            tag, position = _varint(data, position)
            if tag & 7 == 2:
                size, position = _varint(data, position)
                position += size
            elif tag & 7 in (1, 5):
                position += 8 if tag & 7 == 1 else 4
            elif tag & 7 == 0:
                _, position = _varint(data, position)
            else:
                raise IndexError
            pieces += tag == 0x0A
        if position != len(data) or not pieces:
            raise IndexError
    except IndexError:
        raise CheckpointError("not a SentencePiece model", path, "give the tokenizer.model of the weights") from None
    return pieces


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise IndexError
