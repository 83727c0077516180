"""Overlap of training rows with the rows that a run is judged on: equal rows, and 13-grams of words.

The n-grams are those of GPT-3 (Brown et al. 2020, appendix C): words in lower case, separated by white space, without
punctuation; a row overlaps if one of its 13-grams stands in a training row. What more than ten training rows share (or
more than half of fewer than twenty) is a template or a phrase: its words are cut out, and n-grams do not span the cut.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from llamatune.data.batches import Split
from llamatune.errors import Stopped
from llamatune.events import OnEvent, Progress, ShouldStop
from llamatune.tokenizers.tokenizer import Tokenizer

N = 13
MOST_SHARING = 10
"""Training rows that share what counts as an overlap."""

_PUNCTUATION = re.compile(r"[^\w\s]|_")
_Gram = tuple[str, ...]


@dataclass(frozen=True)
class Overlap:
    """How many of ``rows`` overlap with training rows.

    ``equal_rows`` have all ids of a training row, ``equal_prompts`` those before its first target; None: the rows are
    not prepared. ``ngram_rows`` share a 13-gram, ``short_rows`` have none to share. ``share``: of the rows, those that
    overlap in any of the three ways.
    """

    name: str
    rows: int
    equal_rows: int | None
    equal_prompts: int | None
    ngram_rows: int
    short_rows: int
    share: float


@dataclass(frozen=True)
class JudgedRows:
    """Rows that a run is judged on: their texts, and of prepared rows also their ids and first targets."""

    name: str
    texts: Sequence[str]
    ids: Sequence[tuple[bytes, bytes]] | None = None


def prepared_rows(name: str, split: Split, tokenizer: Tokenizer, limit: int | None) -> JudgedRows:
    """The texts and ids of prepared rows."""
    found = list(_rows(split, limit))
    return JudgedRows(name, [tokenizer.decode(ids) for ids, _ in found], [_keys(*row) for row in found])


def words_of(text: str) -> list[str]:
    """Words in lower case without punctuation."""
    return _PUNCTUATION.sub("", text.lower()).split()


def find_overlaps(
    judged: Sequence[JudgedRows], train: Split, tokenizer: Tokenizer, on_event: OnEvent, should_stop: ShouldStop
) -> list[Overlap]:
    """Compare each of ``judged`` with the training rows, which are read once."""
    words = [[words_of(text) for text in rows.texts] for rows in judged]
    sharing = dict.fromkeys((gram for of_rows in words for row in of_rows for gram in _grams(row)), 0)
    ids, prompts = set[bytes](), set[bytes]()
    wanted = {key for rows in judged for keys in rows.ids or () for key in keys}
    for number, (row, first) in enumerate(_rows(train), start=1):
        if should_stop():
            raise Stopped("stopped while comparing rows")
        for gram in set(_grams(words_of(tokenizer.decode(row)))) & sharing.keys():
            sharing[gram] += 1
        whole, prompt = _keys(row, first)
        ids |= {whole} & wanted
        prompts |= {prompt} & wanted
        on_event(Progress("comparing rows", number, len(train)))
    most = min(MOST_SHARING, max(1, len(train) // 2))
    return [_overlap(rows, of_rows, sharing, most, ids, prompts) for rows, of_rows in zip(judged, words, strict=True)]


def _overlap(
    judged: JudgedRows,
    words: Sequence[Sequence[str]],
    sharing: dict[_Gram, int],
    most: int,
    ids: set[bytes],
    prompts: set[bytes],
) -> Overlap:
    shared, short = set[int](), 0
    for number, row in enumerate(words):
        counts = [sharing[gram] for gram in _grams(row)]
        cut = {place + i for place, count in enumerate(counts) if count > most for i in range(N)}
        own = [count for place, count in enumerate(counts) if cut.isdisjoint(range(place, place + N))]
        short += not own
        if any(own):
            shared.add(number)
    equal = alike = None
    overlapping = set(shared)
    if judged.ids is not None:
        same_rows = {number for number, (whole, _) in enumerate(judged.ids) if whole in ids}
        same_prompts = {number for number, (_, prompt) in enumerate(judged.ids) if prompt in prompts}
        overlapping |= same_rows | same_prompts
        equal, alike = len(same_rows), len(same_prompts)
    return Overlap(judged.name, len(words), equal, alike, len(shared), short, len(overlapping) / len(words))


def _grams(words: Sequence[str]) -> Iterable[_Gram]:
    return (tuple(words[place : place + N]) for place in range(len(words) - N + 1))


def _rows(split: Split, limit: int | None = None) -> Iterator[tuple[list[int], int]]:
    """The ids of each row, and the place of its first target."""
    size = len(split) if limit is None else min(limit, len(split))
    for number in range(size):
        batch = split.batch([number])
        targets = (batch.labels[0] >= 0).nonzero()
        yield batch.input_ids[0].tolist(), int(targets[0])


def _keys(ids: Sequence[int], first: int) -> tuple[bytes, bytes]:
    """What equal rows and equal prompts have in common; a prompt of at most one token (BOS) is nobody else's."""
    whole = _bytes(b"row", ids)
    return whole, _bytes(b"prompt", ids[:first]) if first > 1 else whole


def _bytes(kind: bytes, ids: Sequence[int]) -> bytes:
    return kind + array("i", ids).tobytes()
