"""Prefix check: whether a prompt encoded alone has the tokens that its row begins with, as ``generate`` needs."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from llamatune.data.segments import Conversation, Segment
from llamatune.tokenizers.tokenizer import Tokenizer

_SPACE = "▁"
_PROBE = "A  ﬁne \uff58 é\u0301 ½ \n\t z"
"""Text that a normalising tokenizer does not decode to itself."""
_WORD_END = re.compile(r"(?<! ) ")


class PromptCheck:
    """Compares the tokens of prompts with those of their rows, from the word at the boundary alone where possible.

    If no piece of the vocabulary spans a word and the space behind it, and text is not normalised, the tokens of a word
    do not depend on other words. Then only the prompt's last word has to be encoded, alone and with what follows it.
    With other tokenizers the whole prompt is encoded again.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._by_word = _encodes_words_apart(tokenizer)
        self._encode = functools.lru_cache(maxsize=4096)(tokenizer.encode)
        self._encode_after = functools.lru_cache(maxsize=256)(self._encode_between)  # `assistant\n`, again and again

    def are_prefixes(self, conversation: Conversation, ids: Sequence[int]) -> bool:
        """Whether ``ids``, of the conversation, begin with those of each of its prompts.

        Special tokens keep texts apart, so only the text around a prompt's end has to be encoded again.
        """
        parts = conversation.segments.parts
        if not conversation.segments.rendered:
            return self.is_prefix(parts[0].text, parts[1].text, ids)
        specials = [part.special_id for part in parts if part.special_id is not None]
        places = _places(specials, ids)
        for end in conversation.prompt_ends:
            before = sum(part.special_id is not None for part in parts[:end])
            begin = max((n + 1 for n in range(end) if parts[n].special_id is not None), default=0)
            until = next((n for n in range(end, len(parts)) if parts[n].special_id is not None), len(parts))
            prompt, rest = ("".join(part.text for part in some) for some in (parts[begin:end], parts[end:until]))
            if not prompt or not rest:
                continue
            first = places[before - 1] + 1 if before else 0
            last = places[before] if before < len(places) else len(ids)
            after = parts[begin - 1] if begin else None
            if not self.is_prefix(prompt, rest, [*self._tokenizer.beginning, *ids[first:last]], after):
                return False
        return True

    def is_prefix(self, prompt: str, completion: str, ids: Sequence[int], after: Segment | None = None) -> bool:
        """Whether ``ids``, of ``prompt + completion`` with BOS, begin with those of ``prompt``.

        ``after``: the special token that precedes the text, if it is not at the beginning.
        """
        if not prompt:
            return True
        if self._by_word:
            tail = prompt[_last_word(prompt) :]
            end = _WORD_END.search(tail + completion, len(tail))
            word = tail + completion if end is None else (tail + completion)[: end.start()]
            if len(tail) + len(word) < len(prompt) and _SPACE not in word:  # SentencePiece encodes ▁ as a space
                alone = self._encode(tail)
                return self._encode(word)[: len(alone)] == alone
        if after is None:
            alone = self._tokenizer.encode(prompt)
        else:
            alone = self._encode_after((after.text, after.special_id), prompt)
        return list(ids[: len(alone)]) == alone

    def _encode_between(self, special: tuple[str, int | None], text: str) -> list[int]:
        """BOS and the ids of ``text`` behind a special token."""
        return [*self._tokenizer.beginning, *self._tokenizer.encode_mixed([special, (text, None)])[0][1:]]


def _places(specials: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Where the special tokens are in ``ids``, in order."""
    places, at = list[int](), -1
    for special in specials:
        at = ids.index(special, at + 1)
        places.append(at)
    return places


def _last_word(prompt: str) -> int:
    """Index of the last word, after the one space that encoding adds again (dummy prefix); 0 if it is the only word.

    Further spaces before the word, and all spaces after it, belong to it.
    """
    end = len(prompt.rstrip(" "))
    space = prompt.rfind(" ", 0, end)
    while space > 0 and prompt[space - 1] == " ":
        space -= 1
    return space + 1 if space > 0 else 0


def _encodes_words_apart(tokenizer: Tokenizer) -> bool:
    pieces = tokenizer.pieces()
    if tokenizer.matches_words:
        return False
    if _SPACE not in pieces or any(_SPACE in piece.lstrip(_SPACE) for piece in pieces):
        return False
    ids = tokenizer.encode(_PROBE)
    return tokenizer.decode(ids) == _PROBE and tokenizer.piece(ids[len(tokenizer.beginning)]).startswith(_SPACE)
