"""Boundaries between prompts and answers: what encoding a row as a whole would make of them."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from llamatune.data.segments import Segments
from llamatune.tokenizers.tokenizer import Tokenizer

_LONGEST = 48
_FIRST_WORD = re.compile(r"\s*\S*")


class Boundaries:
    """Counts rows in which the tokens at a prompt's end are not those of the whole text, by the words on both sides."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._is_forced = functools.lru_cache(maxsize=8192)(self._differs)

    def are_forced(self, segments: Segments) -> bool:
        """Whether this is so at any of its boundaries."""
        parts = segments.parts
        for cut in segments.cuts if segments.rendered else (1,):
            before, after = parts[cut - 1 : cut], parts[cut : cut + 1]
            if not before or not after or before[0].special_id is not None or after[0].special_id is not None:
                continue
            last, first = _last_word(before[0].text), _FIRST_WORD.match(after[0].text, 0, _LONGEST)
            if last and first and self._is_forced(last, first[0]):
                return True
        return False

    def _differs(self, last: str, first: str) -> bool:
        encode = self._tokenizer.encode_continuation
        ids = encode(last, ())
        return encode(last + first, ()) != [*ids, *encode(first, ids)]


def _last_word(text: str) -> str:
    """With the white space on both sides of it."""
    end = text[-_LONGEST:]
    word = end.rstrip()
    return end[max(word.rfind(" "), word.rfind("\n"), 0) :]


def begin_with_prompts(segments: Segments, ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether ``ids``, of ``segments``, begin with those of each of its prompts."""
    for cut in segments.cuts if segments.rendered else (1,):
        prompt, _ = Segments(segments.parts[:cut], segments.rendered).encode(tokenizer)
        if [*ids[: len(prompt)]] != prompt:
            return False
    return True
