"""SentencePiece tokenizer, that of LLaMA 1 and 2: encoding and decoding, with the tokens that were added beside it."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from llamatune.errors import CheckpointError
from llamatune.events import OnEvent, ignore_event
from llamatune.safe_reading import digest_bytes
from llamatune.tokenizers.added_tokens import AddedToken
from llamatune.tokenizers.agreement import Additions, read_additions
from llamatune.tokenizers.sentencepiece_check import read_checked
from llamatune.tokenizers.tokenizer import Encoded, Tokenizer, effective_cuts, refuse_surrogates

_CUT = -1
"""Stands for a special token in the text that is encoded; no token spans it."""
_NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])
"""``normalizer_spec { add_dummy_prefix: false }`` as a field of the model's protocol buffer."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with BOS and EOS, and further tokens beyond its pieces.

    A pickle holds the model's bytes, so that a worker process needs neither the file nor another check.

    Args:
        model: the bytes of a ``tokenizer.model`` that ``read_checked`` has checked.
        path: the file they were read from.
        additions: what the files beside it say; None: nothing.
    """

    def __init__(self, model: bytes, path: Path, additions: Additions | None = None) -> None:
        self._model = model
        self.path = path
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._size = self._processor.vocab_size()
        own = Additions((), self._processor.bos_id(), self._processor.eos_id())
        self._additions = additions = own if additions is None else additions
        self.bos_id, self.eos_id = additions.bos_id, additions.eos_id
        self._added = {token.id: token for token in additions.tokens if token.id is not None}
        self.vocab_size = max([self._size - 1, *self._added]) + 1
        self.fingerprint = _fingerprint(model, own, additions)
        controls = {self.piece(i): i for i in range(self._size) if self._processor.is_control(i)}
        self.special_ids = controls | {token.text: i for i, token in self._added.items() if token.is_special}
        words = [token for token in self._added.values() if not token.is_special]
        self.matches_words = bool(words)
        self._words = _pattern(words)
        self._ids = {token.text: i for i, token in self._added.items()}
        self._later = self._processor if additions.legacy or not self._added else _without_dummy_prefix(model)

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[bytes, Path, Additions]]:
        return SentencePieceTokenizer, (self._model, self.path, self._additions)

    def encode(self, text: str) -> list[int]:
        refuse_surrogates(text)
        if self.matches_words:
            return [*self.beginning, *self.encode_with_offsets(text)[0]]
        return [*self.beginning, *self._processor.encode(text)]

    def encode_continuation(self, text: str, before: Sequence[int]) -> list[int]:
        refuse_surrogates(text)
        if self.matches_words:
            return self.encode_with_offsets(text, before)[0]
        return list(self._continuing.encode(text))

    def encode_with_offsets(self, text: str, before: Sequence[int] | None = None) -> Encoded:
        return self._encode_run(text, self._processor_behind(before))

    def encode_mixed(self, parts: Sequence[tuple[str, int | None]], before: Sequence[int] | None = None) -> Encoded:
        """A text after BOS or EOS gets a dummy prefix, as Meta encodes the turns of a chat."""
        ids, offsets, begin, special_before = list[int](), list[tuple[int, int]](), 0, None
        runs = [list(run) for _, run in itertools.groupby(parts, key=lambda part: part[1] is None)]
        for run, following in itertools.zip_longest(runs, runs[1:]):
            if run[0][1] is None:
                text = "".join(part for part, _ in run)
                kept = text.rstrip() if following and self._strips(following[0][1], "lstrip") else text
                start = len(kept) - len(kept.lstrip()) if self._strips(special_before, "rstrip") else 0
                processor = self._later if special_before in self._added else self._processor
                if special_before in (None, _CUT):
                    processor = self._processor_behind(before if special_before is None else ids)
                found, spans = self._encode_run(kept[start:], processor)
                ids += found
                offsets += [(begin + start + first, begin + start + last) for first, last in spans]
                begin += len(text)
            for text, special in run:
                if special == _CUT:
                    special_before = _CUT
                elif special is not None:
                    ids.append(special)
                    offsets.append((begin, begin + len(text)))
                    begin, special_before = begin + len(text), special
        return ids, offsets

    def encode_cut(self, parts: Sequence[tuple[str, int | None]], cuts: Sequence[int]) -> Encoded:
        marked = list(parts)
        for cut in reversed(effective_cuts(parts, cuts)):
            marked.insert(cut, ("", _CUT))
        return self.encode_mixed(marked)

    def _strips(self, special: int | None, side: str) -> bool:
        """Whether white space on this side of a special token belongs to it."""
        return special in self._added and bool(getattr(self._added[special], side))

    def _processor_behind(self, before: Sequence[int] | None) -> sentencepiece.SentencePieceProcessor:
        if before is None:
            return self._processor
        return self._later if before[-1:] and before[-1] in self._added else self._continuing

    @functools.cached_property
    def _continuing(self) -> sentencepiece.SentencePieceProcessor:
        """For text behind other text."""
        return _without_dummy_prefix(self._model) if self._later is self._processor else self._later

    def _encode_run(self, text: str, processor: sentencepiece.SentencePieceProcessor) -> Encoded:
        """``processor``: for what precedes the text's first added word."""
        refuse_surrogates(text)
        if not self.matches_words:
            encoded = processor.encode(text, return_type="offset_mapping")
            return encoded["ids"], encoded["offsets"]
        ids, offsets, begin = list[int](), list[tuple[int, int]](), 0
        # The dummy prefix of a text, with no text behind it.
        if processor is self._processor and not self._additions.legacy and self._words.match(text):
            ids, offsets = [self._processor.piece_to_id("▁")], [(0, 0)]
        for match in itertools.chain(self._words.finditer(text), [None]):
            end = len(text) if match is None else match.start()
            if begin < end:
                encoded = processor.encode(text[begin:end], return_type="offset_mapping")
                ids += encoded["ids"]
                offsets += [(begin + first, begin + last) for first, last in encoded["offsets"]]
            if match is not None:
                ids.append(self._ids[next(word for word in match.groups() if word is not None)])
                offsets.append(match.span())
                processor, begin = self._later, match.end()
        return ids, offsets

    def decode(self, ids: Iterable[int]) -> str:
        processor = self._processor
        if not self._added:
            plain = [i for i in ids if 0 <= i < self._size and not processor.is_control(i)]
            return str(processor.decode(plain))
        parts, given = list[str](), list(ids)
        text = given[1:] if given[:1] == [self.bos_id] else given  # a BOS may be an added token too
        for is_added, group in itertools.groupby(text, key=self._added.__contains__):
            if is_added:
                parts += [self._added[i].text for i in group if not self._added[i].is_special]
            else:
                plain = [i for i in group if 0 <= i < self._size and not processor.is_control(i)]
                parts.append(str(processor.decode(plain)))
            processor = self._later
        return "".join(parts)

    def pieces(self) -> list[str]:
        own = self._processor.id_to_piece(list(range(self._size)))
        return [*own, *(self.piece(i) for i in range(self._size, self.vocab_size))]

    def piece(self, token_id: int) -> str:
        if token_id >= self._size:
            return self._added[token_id].text if token_id in self._added else ""
        return str(self._processor.id_to_piece(token_id))


def load_sentencepiece(path: Path, on_event: OnEvent = ignore_event) -> SentencePieceTokenizer:
    """The tokenizer in a ``tokenizer.model`` file.

    Raises:
        CheckpointError: no SentencePiece model, a broken one, one without BOS or EOS, or one that the files beside it
            contradict.
    """
    model = read_checked(path)
    tokenizer = SentencePieceTokenizer(model, path)
    bos_id, eos_id = tokenizer._processor.bos_id(), tokenizer.eos_id
    for name, token_id in (("BOS", bos_id), ("EOS", eos_id)):
        if not 0 <= token_id < tokenizer.vocab_size:
            raise CheckpointError(f"the tokenizer has no {name} token", path, "use LLaMA's own tokenizer.model")
    additions = read_additions(path, tokenizer.pieces(), bos_id, eos_id, on_event)
    return SentencePieceTokenizer(model, path, additions) if additions.change(bos_id, eos_id) else tokenizer


def count_pieces(path: Path) -> int:
    """The vocabulary size of a ``tokenizer.model`` file; ``CheckpointError`` if it is no SentencePiece model."""
    return int(sentencepiece.SentencePieceProcessor(model_proto=read_checked(path)).vocab_size())


def _fingerprint(model: bytes, own: Additions, additions: Additions) -> str:
    """The digest of the file; of more than the file where more determines ids."""
    if not additions.change(own.bos_id, own.eos_id):
        return f"sha256:{digest_bytes(model)}"
    tokens = [(t.id, t.text, t.is_special, t.lstrip, t.rstrip, t.single_word) for t in additions.tokens]
    facts = repr((digest_bytes(model), tokens, additions.bos_id, additions.eos_id, additions.legacy))
    return f"sha256:{digest_bytes(facts.encode())}"


def _pattern(words: list[AddedToken]) -> re.Pattern[str]:
    """Each added word as a group of its own, the longest first, with the white space that belongs to it."""
    alternatives = []
    for word in sorted(words, key=lambda word: -len(word.text)):
        inner = f"({re.escape(word.text)})"
        if word.single_word:
            inner = rf"(?<!\w){inner}(?!\w)"
        alternatives.append((r"\s*" if word.lstrip else "") + inner + (r"\s*" if word.rstrip else ""))
    return re.compile("|".join(alternatives) or r"\Z(?!\Z)")


def _without_dummy_prefix(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """The model without a space before a text. A message that comes twice is merged, the last value of a field wins."""
    return sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
