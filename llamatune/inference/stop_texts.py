"""Texts that end a completion, wherever tokens begin and end in them."""

from __future__ import annotations

import functools
import itertools
from bisect import bisect_right
from collections.abc import Sequence

from llamatune.data.segments import Segments
from llamatune.inference.prompt_encoding import shown_answer
from llamatune.tokenizers.tokenizer import Tokenizer

_WITHOUT_TEXT = 32
"""Tokens without text that may lie within a text; any other has a byte of it at least."""


class StopTexts:
    """Looks for ``texts`` in the bytes of the last tokens, one of which is new with every call.

    As in transformers, a text may begin in the prompt, and may hold the name of a special token. Special tokens within
    it that it does not name are passed over, since they are not shown.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, [text.encode() for text in texts]
        self._tokens = max(map(len, self._texts)) + _WITHOUT_TEXT
        self._bytes = functools.cache(tokenizer.token_bytes)
        self._vocabulary = tokenizer.vocab_size
        self._specials = frozenset(tokenizer.special_ids.values())

    def is_enough(self, prompt: Sequence[int], ids: Sequence[int]) -> bool:
        """Whether one of the texts ends in the last of ``ids``, which follow ``prompt``."""
        return self._begin(prompt, ids) is not None

    def shown_answer(self, segments: Segments, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """As ``prompt_encoding.shown_answer``, up to the text that ends in the last of ``ids``; "": before them."""
        begin = self._begin(prompt, ids)
        if begin is None:
            return shown_answer(self._tokenizer, segments, prompt, ids)
        token, byte = begin
        if token < 0:
            return ""
        text = shown_answer(self._tokenizer, segments, prompt, ids[: token + (byte > 0)])
        if byte == 0 or not self._is_shown(ids[token]):
            return text
        rest = self._bytes(ids[token])[byte:].decode(errors="replace")
        return text[: max(0, len(text) - len(rest))]

    def _begin(self, prompt: Sequence[int], ids: Sequence[int]) -> tuple[int, int] | None:
        """Where the text begins that ends in the last id, the longest of several; None: there is none.

        The token's place in ``ids``, negative in the prompt, and the byte in it.
        """
        tail = ids[-self._tokens :]
        if len(tail) < self._tokens:
            tail = [*prompt[len(tail) - self._tokens :], *tail]
        named = [self._bytes(token) for token in tail]
        shown = [piece if self._is_shown(token) else b"" for token, piece in zip(tail, named, strict=True)]
        begins = [begin for pieces in (named, shown) for text in self._texts if (begin := _begin_in(pieces, text))]
        if not begins:
            return None
        token, byte = min(begins)
        return token + len(ids) - len(tail), byte

    def _is_shown(self, token: int) -> bool:
        return 0 <= token < self._vocabulary and token not in self._specials


def _begin_in(pieces: Sequence[bytes], text: bytes) -> tuple[int, int] | None:
    """The piece and the byte in it where the first ``text`` begins that ends in the last piece."""
    joined = b"".join(pieces)
    byte = joined.find(text, max(0, len(joined) - len(pieces[-1]) + 1 - len(text)))
    if byte < 0:
        return None
    ends = list(itertools.accumulate(map(len, pieces)))
    place = bisect_right(ends, byte)
    return place, byte - ends[place] + len(pieces[place])
