"""The final number of a GSM8K answer, and where no more text can change it.

Reference answers end in ``#### 18``. The rule of scoring is the data set's own (``grade_school_math/dataset.py`` of its
repository): the first match of ``ANSWER`` without its commas, compared as text. So ``18.0`` is not ``18``, and an
answer without the mark is wrong.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Sequence

from llamatune.tokenizers.tokenizer import Tokenizer

ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
_TAIL = 48
_BESIDE_NUMBER = 16
"""Tokens of a tail that are left for the mark before a number, the text behind it, and parts of a character."""


def extract_answer(text: str) -> str | None:
    """The final number of an answer, as text without commas; None: none is marked."""
    match = ANSWER.search(text)
    return None if match is None else match.group(1).replace(",", "")


def is_answered(text: str, few_shot: bool) -> bool:
    """Whether no more text can change the score: the marked number or, few-shot, the whole answer has ended."""
    match = ANSWER.search(text)
    return (match is not None and match.end() < len(text)) or (few_shot and "Question:" in text)


class AnswerEnds:
    """Whether an answer ``is_answered``, asked after each of its ids: the last of them decide it."""

    def __init__(self, tokenizer: Tokenizer, few_shot: bool) -> None:
        self._tokenizer, self._few_shot = tokenizer, few_shot
        self._specials = frozenset(tokenizer.special_ids.values())
        self._number_characters = functools.cache(self._number_characters_of)

    def is_enough(self, prompt: Sequence[int], ids: Sequence[int]) -> bool:
        """``is_answered`` of the text of ``ids``, if it was not of any that they begin with."""
        if sum(map(self._number_characters, ids[-_TAIL:])) < _TAIL - _BESIDE_NUMBER:
            return False  # there is neither a mark nor a long number in them, and they need not be decoded
        size, of_text = _TAIL, range(self._tokenizer.vocab_size)
        while True:
            shown = (token for token in reversed(ids) if token in of_text and token not in self._specials)
            tail = list(itertools.islice(shown, size))[::-1]
            text = self._tokenizer.decode(tail)
            if is_answered(text, self._few_shot):
                return True
            # A number that the tail begins in may have its mark before it, and has just ended.
            digits = size - _BESIDE_NUMBER
            if len(tail) < size or not re.search(rf"[0-9.,]{{{digits}}}[^0-9.,]", text):
                return False
            size *= 2

    def _number_characters_of(self, token: int) -> float:
        """Its characters that a number may have; without bound if it has no text, or may be of what ends an answer."""
        if not 0 <= token < self._tokenizer.vocab_size or token in self._specials:
            return math.inf
        text = self._tokenizer.decode([token])
        return math.inf if "#" in text or ":" in text else len(re.findall(r"[0-9.,]", text))
