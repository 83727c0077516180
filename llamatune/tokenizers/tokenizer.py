"""The interface of a tokenizer: text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from llamatune.errors import CheckpointError

SENTENCEPIECE_FILE = "tokenizer.model"


class Tokenizer(Protocol):
    """Token ids of text, with BOS and EOS. Instances can be pickled, since worker processes receive them.

    Args:
        fingerprint: ``sha256:`` and the digest of the tokenizer's file.
        vocab_size: ids are below it.
    """

    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """BOS and the ids of ``text``; no EOS. Control strings such as ``</s>`` in ``text`` are plain text."""

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """BOS and the ids of ``prompt + completion`` encoded in one call, and the index of the first completion token.

        A token belongs to the completion if it holds any character of it, even if it begins in the prompt. Several
        tokens of one character (its UTF-8 bytes, or its normalised form) belong where the character belongs. With an
        empty prompt every token after BOS is the completion's, SentencePiece's dummy prefix included: a model that is
        given only BOS has to generate that prefix too. No EOS.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, without BOS, EOS, other control tokens, and ids beyond the vocabulary (padded heads)."""

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text that ``ids`` add to ``prompt``. Decoded alone they would lose a space at their start."""
        before, whole = self.decode(prompt), self.decode([*prompt, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.decode(ids)

    def pieces(self) -> list[str]:
        """The vocabulary by id: ``▁`` is a space, ``<0xE2>`` a byte, ``</s>`` the EOS."""

    def piece(self, token_id: int) -> str:
        """One entry of ``pieces``."""


def check_vocabulary(tokenizer: Tokenizer, embedding_rows: int, where: object) -> None:
    """Raise ``CheckpointError`` if the tokenizer has ids beyond the model's embedding; spare rows are allowed."""
    if tokenizer.vocab_size > embedding_rows:
        what = f"tokenizer id {tokenizer.vocab_size - 1} >= {embedding_rows} embedding rows"
        raise CheckpointError(what, where, "use the tokenizer that belongs to this model")
