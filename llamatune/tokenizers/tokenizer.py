"""The interface of a tokenizer: text to token ids and back."""

from __future__ import annotations

import functools
import itertools
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Protocol

from llamatune.errors import CheckpointError, DataError

SENTENCEPIECE_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
Encoded = tuple[list[int], list[tuple[int, int]]]
"""Ids, and the characters (begin, end) that each stands for."""
_STREAM_CONTEXT = 16
"""Tokens of the prompt that a stream decodes with: more than the tokens of one character (4 bytes)."""
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_HALVES = (("a", "b"), ("a", " b"), ("a", "  b"), ("a:", "\nb"), ("a ", "b"), ("a\n", "b"))
"""Texts in two parts, of which a tokenizer that changes white space loses some."""


class Tokenizer(Protocol):
    """Token ids of text, with BOS and EOS. Instances can be pickled, since worker processes receive them.

    A special token never comes from text: it is put in by its id.

    Args:
        path: the file it was read from.
        fingerprint: ``sha256:`` and a digest of everything that determines ids.
        vocab_size: ids are below it.
        bos_id: put before a text; None: none is.
        eos_id: put after a row, never after a prompt.
        special_ids: every special token's id by its text, BOS and EOS included.
        matches_words: tokens that were added to the vocabulary are found in text before it is encoded.
    """

    path: Path
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int
    special_ids: Mapping[str, int]
    matches_words: bool

    def encode_with_offsets(self, text: str, before: Sequence[int] | None = None) -> Encoded:
        """Ids of ``text`` without BOS, and the characters (begin, end) that each stands for; ends never decrease.

        ``before``: the ids of the text that it continues, so that it gets no dummy prefix; None: it is the beginning.

        Several tokens of one character (its UTF-8 bytes, or its normalised form) each have that character, or all but
        the last are empty at its beginning.
        """

    def encode_mixed(self, parts: Sequence[tuple[str, int | None]], before: Sequence[int] | None = None) -> Encoded:
        """Ids and offsets of texts and special tokens in turn, as transformers encodes them in one text; no BOS is put.

        A part is (text, None) or (the special token's text, its id); offsets count the characters of all parts. White
        space beside a special token belongs to it where the vocabulary says so.
        """

    def encode(self, text: str) -> list[int]:
        """BOS, where one is put, and the ids of ``text``; no EOS. ``</s>`` and the like in ``text`` are plain text."""

    def encode_cut(self, parts: Sequence[tuple[str, int | None]], cuts: Sequence[int]) -> Encoded:
        """As ``encode_mixed``, but what precedes a part in ``cuts`` is encoded alone, and no token spans the two.

        The text behind a cut, up to the next special token or cut, continues the text before it.
        """
        edges = {0: True, len(parts): True}
        for cut in effective_cuts(parts, cuts):
            following = next((n for n in range(cut, len(parts)) if parts[n][1] is not None), len(parts))
            edges |= {following: True, cut: cut == following}
        if len(edges) == 2:
            return self.encode_mixed(parts)
        ids, offsets, characters, ordered = list[int](), list[tuple[int, int]](), 0, sorted(edges.items())
        for (begin, begins), (end, _) in itertools.pairwise(ordered):
            # With the special token that follows, since white space before it may belong to it.
            after = [part for part in parts[end : end + 1] if not begins and part[1] is not None]
            found, spans = self.encode_mixed([*parts[begin:end], *after], None if begins else ids)
            kept = len(found) - len(after)
            ids += found[:kept]
            offsets += [(characters + first, characters + last) for first, last in spans[:kept]]
            characters += sum(len(text) for text, _ in parts[begin:end])
        return ids, offsets

    def encode_continuation(self, text: str, before: Sequence[int]) -> list[int]:
        """The ids of ``text`` behind the text of the ids ``before``: neither BOS nor dummy prefix."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, without BOS, EOS, other special tokens, and ids beyond the vocabulary (padded heads)."""

    def pieces(self) -> list[str]:
        """The vocabulary by id: ``▁`` is a space, ``<0xE2>`` a byte, ``</s>`` the EOS; empty: no such id."""

    def piece(self, token_id: int) -> str:
        """One entry of ``pieces``."""

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 that a token adds to a text, perhaps a part of a character; of a special token, that of its name.

        Of an id without a token a byte that no text has.
        """
        piece = self.piece(token_id) if 0 <= token_id < self.vocab_size else ""
        if _BYTE.fullmatch(piece):
            return bytes.fromhex(piece[3:5])
        return piece.replace("▁", " ").encode() or b"\xff"

    @property
    def beginning(self) -> list[int]:
        """The ids before every text: BOS, or none."""
        return [] if self.bos_id is None else [self.bos_id]

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """BOS and the ids of ``prompt + completion`` encoded in one call, and the index of the first completion token.

        A token belongs to the completion if it holds any character of it, even if it begins in the prompt. Several
        tokens of one character belong where the character belongs. With an empty prompt every token after BOS is the
        completion's, SentencePiece's dummy prefix included: a model that is given only BOS has to generate that prefix
        too. No EOS.
        """
        text, beginning = prompt + completion, self.beginning
        if not prompt or not completion:
            ids = self.encode(text)
            return ids, len(beginning) if completion else len(ids)
        ids, offsets = self.encode_with_offsets(text)
        boundary = len(prompt)
        first = bisect_right(offsets, boundary, key=itemgetter(1))
        while first > 0 and offsets[first - 1] == (boundary, boundary):
            first -= 1
        return [*beginning, *ids], len(beginning) + first

    def encode_apart(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """BOS, the ids of ``prompt`` alone and those of ``completion`` behind it, and the index of the first of these.

        As ``encode_pair`` where ``prompt`` has no token, and where the text would become another.
        """
        ids = self.encode(prompt)
        first = len(ids)
        if first > len(self.beginning):
            ids += self.encode_continuation(completion, ids)
            if self.splits or self.decode(ids) == self.decode(self.encode(prompt + completion)):
                return ids, first
        return self.encode_pair(prompt, completion)

    @functools.cached_property
    def splits(self) -> bool:
        """Whether any text can be encoded in two parts, whose ids together are decoded to the same text."""
        for begin, end in _HALVES:
            ids = self.encode(begin)
            if self.decode([*ids, *self.encode_continuation(end, ids)]) != self.decode(self.encode(begin + end)):
                return False
        return True

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text that ``ids`` add to ``prompt``. Decoded alone they would lose a space at their start."""
        stream = TextStream(self, prompt)
        return "".join([*map(stream.push, ids), stream.finish()])


class TextStream:
    """The text of ids that come one at a time, after a prompt: each call returns the text that is certain by then.

    The bytes of an unfinished character wait for the rest of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_STREAM_CONTEXT:])
        self._shown, self._shown_ids = tokenizer.decode(self._ids), len(self._ids)

    def push(self, token_id: int) -> str:
        """The new text; empty as long as there is none."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        if len(text) <= len(self._shown) or text.endswith("\ufffd"):
            return ""
        new = text[len(self._shown) :]
        # The last text that was shown stays as context: decoded first, a token would lose its space.
        del self._ids[: self._shown_ids]
        self._shown, self._shown_ids = self._tokenizer.decode(self._ids), len(self._ids)
        return new

    def finish(self) -> str:
        """What was still waiting; of an unfinished character a replacement character."""
        return self._tokenizer.decode(self._ids)[len(self._shown) :]


def effective_cuts(parts: Sequence[tuple[str, int | None]], cuts: Sequence[int]) -> list[int]:
    """The cuts of ``encode_cut`` before which there is text; a special token is one token in any case."""
    return [cut for cut in cuts if 0 < cut < len(parts) and parts[cut - 1][1] is None]


def refuse_surrogates(text: str) -> None:
    """Raise ``DataError`` for text that has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as fault:
        raise DataError(f"the text holds a lone surrogate at character {fault.start}, which is no character") from None


def check_vocabulary(tokenizer: Tokenizer, embedding_rows: int, where: object) -> None:
    """Raise ``CheckpointError`` if the tokenizer has ids beyond the model's embedding; spare rows are allowed."""
    if tokenizer.vocab_size > embedding_rows:
        what = f"tokenizer id {tokenizer.vocab_size - 1} >= {embedding_rows} embedding rows"
        raise CheckpointError(what, where, "use the tokenizer that belongs to this model")
