"""Whether a prompt alone gives the tokens that its row begins with, as ``generate`` will have to find them."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from llamatune.tokenizers.base import Tokenizer

_SPACE = "▁"
_PROBE = "A  ﬁne \uff58 é\u0301 ½ \n\t z"
"""Text that a normalising tokenizer gives back as something else."""
_WORD_END = re.compile(r"(?<! ) ")


class PromptCheck:
    """Compares the tokens of prompts with those of their rows, where it can from the word at the boundary alone.

    Where no piece of the vocabulary reaches from a word across the space behind it, and text is encoded as it stands,
    a word's tokens are the same whatever stands around it. Then the tokens before the last word of the prompt are equal
    in any case, and two short texts tell the rest; with other tokenizers the whole prompt is encoded once more.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._by_word = _encodes_words_apart(tokenizer)
        self._encode = functools.lru_cache(maxsize=4096)(tokenizer.encode)

    def is_prefix(self, prompt: str, completion: str, ids: Sequence[int]) -> bool:
        """Whether ``ids``, of ``prompt + completion`` with BOS, begin with those of ``prompt``."""
        if not prompt:
            return True
        if self._by_word:
            tail = prompt[_last_word(prompt) :]
            found = _WORD_END.search(tail + completion, len(tail))
            word = tail + completion if found is None else (tail + completion)[: found.start()]
            if len(tail) + len(word) < len(prompt) and _SPACE not in word:  # in a text it counts as a space
                alone = self._encode(tail)
                return self._encode(word)[: len(alone)] == alone
        alone = self._tokenizer.encode(prompt)
        return list(ids[: len(alone)]) == alone


def _last_word(prompt: str) -> int:
    """Where the last word begins, behind one space, which encoding puts back; 0 if there is but one word.

    Further spaces before the word, and all behind it, belong to it.
    """
    end = len(prompt.rstrip(" "))
    space = prompt.rfind(" ", 0, end)
    while space > 0 and prompt[space - 1] == " ":
        space -= 1
    return space + 1 if space > 0 else 0


def _encodes_words_apart(tokenizer: Tokenizer) -> bool:
    pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    if _SPACE not in pieces or any(_SPACE in piece.lstrip(_SPACE) for piece in pieces):
        return False
    ids = tokenizer.encode(_PROBE)
    return tokenizer.decode(ids) == _PROBE and tokenizer.piece(ids[1]).startswith(_SPACE)


@functools.lru_cache(maxsize=1)
def prompt_check(tokenizer: Tokenizer) -> PromptCheck:
    """The check of ``tokenizer``, made once: looking through a vocabulary takes longer than a batch of rows."""
    return PromptCheck(tokenizer)
