"""Validation rows that are training rows too, found in prepared rows by their tokens."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llamatune.data.batches import Prepared, Split
from llamatune.events import Notice, OnEvent
from llamatune.tokenizers.loading import load_tokenizer, tokenizer_file

_ASCII_BYTE = re.compile(r"<0x([0-7][0-9A-F])>")
_TAIL_TOKENS, _TAIL_CHARACTERS = 16, 12


def warn_of_shared_rows(prepared: Prepared, other: Prepared | None, model: Path, on_event: OnEvent) -> None:
    """Warn of validation rows that are trained on, exactly or but for white space and case.

    ``other``: the validation data, if it is not in ``prepared``. Of one directory ``prepare-data`` has counted them.
    ``model`` is a directory with the tokenizer; without one only equal ids are found.
    """
    validation = other.train if other else prepared.validation
    if validation is None:
        return
    if other is None and len(prepared.manifests) == 1:
        facts = prepared.manifest.facts
        exact, near = (facts.get(f"validation_rows_{where}_train") for where in ("in", "near"))
        exact = exact if isinstance(exact, int) else 0
        near = near if isinstance(near, int) else exact
    else:
        pieces = load_tokenizer(model).pieces() if tokenizer_file(model) else []
        exact, near = count_shared_rows(prepared.train, validation, pieces)
    if near:
        more = f" ({near - exact:,} of them but for white space and case)" if near > exact else ""
        what = f"{near:,} of {len(validation):,} validation rows are training rows too{more}"
        on_event(Notice(f"{what}: the validation loss is too low by them", "warning"))


def count_shared_rows(train: Split, validation: Split, pieces: Sequence[str]) -> tuple[int, int]:
    """How many rows of ``validation`` are in ``train``: by their ids, and by their text without white space and case.

    ``pieces``: the vocabulary; without it texts are not compared, only ids.
    """
    largest = max(train.largest_id, validation.largest_id)
    plain = [_plain(piece) for piece in pieces] + [f"<{number}>" for number in range(len(pieces), largest + 1)]

    def text(ids: NDArray[np.int32]) -> str:
        return "".join([plain[token] for token in ids.tolist()])

    def tail(ids: NDArray[np.int32]) -> str:
        """The last characters: of most rows these suffice to tell that they differ."""
        last = text(ids[-_TAIL_TOKENS:])
        return (last if len(last) >= _TAIL_CHARACTERS else text(ids))[-_TAIL_CHARACTERS:]

    tails, held = set[str](), list[tuple[bytes, bytes]]()
    for ids in validation.rows_of_ids():
        tails.add(tail(ids))
        held.append((_digest(ids.tobytes()), _digest(text(ids).encode(errors="surrogatepass"))))
    exact, near = set[bytes](), set[bytes]()
    for ids in train.rows_of_ids():
        if tail(ids) in tails:
            exact.add(_digest(ids.tobytes()))
            near.add(_digest(text(ids).encode(errors="surrogatepass")))
    return sum(digest in exact for digest, _ in held), sum(digest in near for _, digest in held)


def _plain(piece: str) -> str:
    """A piece without white space and case; an ASCII character that is spelled as its byte is that character."""
    if (byte := _ASCII_BYTE.fullmatch(piece)) is not None:
        piece = chr(int(byte[1], 16))
    return "".join(piece.replace("▁", " ").split()).casefold()


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()
