"""Texts of special tokens in rows: a sign that a row was put in another template already."""

from __future__ import annotations

from collections.abc import Iterable

_KNOWN = (
    "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
    "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>", "<|user|>",
    "<|assistant|>", "<|system|>", "<bos>", "<eos>", "<unk>", "<pad>", "<start_of_turn>", "<end_of_turn>", "[BOS]",
    "[EOS]",
)  # fmt: skip
"""Of the templates that rows are often found in, whatever the tokenizer."""
_SHORTEST = 3


class SpecialTexts:
    """Finds the texts of a tokenizer's special tokens, and of known chat templates, in a text."""

    def __init__(self, special_tokens: Iterable[str]) -> None:
        texts = [text for text in dict.fromkeys((*special_tokens, *_KNOWN)) if len(text) >= _SHORTEST]
        # Searching for one character, then for `<|`, rules out most rows; a search for each of 256 texts is slow.
        self._first_characters = {text[0] for text in texts}
        self._by_beginning: dict[str, list[str]] = {}
        for text in texts:
            self._by_beginning.setdefault(text[:2], []).append(text)

    def first_in(self, text: str) -> str | None:
        """The special text that comes first in ``text``; None: it has none."""
        for character in self._first_characters:
            if character in text:
                break
        else:
            return None
        found = [
            special
            for beginning, specials in self._by_beginning.items()
            if beginning in text
            for special in specials
            if special in text
        ]
        return min(found, key=text.index, default=None)
