"""Segments of a row: texts and special tokens in turn, each a target of the loss or not; their ids and targets."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from llamatune.tokenizers.tokenizer import Tokenizer


class Segment(NamedTuple):
    """A text, or a special token with its id. ``trained``: its tokens are targets."""

    text: str
    trained: bool = False
    special_id: int | None = None


class Segments(NamedTuple):
    """A row or a prompt.

    Args:
        rendered: all that a chat template wrote, BOS included. Otherwise a prompt, and in a row its completion and EOS;
            BOS precedes it where the tokenizer puts one.
        cuts: of a rendered text the parts at which an answer begins: no token spans their beginning, so that the ids
            before it are those of the prompt alone. In other rows it is the completion's.
        moved: the white space at a prompt's end that is encoded with its completion.
        known: the ids of a prompt, where they are given and its text is only shown.
    """

    parts: tuple[Segment, ...]
    rendered: bool = False
    cuts: tuple[int, ...] = ()
    moved: str = ""
    known: tuple[int, ...] | None = None

    @property
    def shown(self) -> str:
        """The text of a prompt, with the special tokens that a chat template writes."""
        return "".join(part.text for part in self.parts if self.rendered or part.special_id is None) + self.moved

    def to_json(self) -> list[Any]:
        """A prompt as JSON values; ``prompt_of_json`` reads them back."""
        parts = [(part.text, part.special_id) for part in self.parts]
        return [self.rendered, parts, self.cuts, self.moved, self.known]

    def encode(self, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and the targets among them as (first, last + 1); no two of them touch.

        A token is a target if it holds any character of a trained text. Several tokens of one character are where the
        character is.
        """
        if self.known is not None:
            return list(self.known), []
        if self.rendered:
            parts = [(part.text, part.special_id) for part in self.parts]
            ids, offsets = tokenizer.encode_cut(parts, self.cuts) if tokenizer.splits else tokenizer.encode_mixed(parts)
            return ids, _joined(_targets(self.parts, offsets))
        prompt, *answer = self.parts
        ids, first = tokenizer.encode_apart(prompt.text, answer[0].text if answer else "")
        ids += [part.special_id for part in answer if part.special_id is not None]
        end = len(ids) if answer and answer[0].trained else first
        return ids, _joined([(0 if prompt.trained else first, end)])


class Conversation(NamedTuple):
    """A row in segments.

    Args:
        is_prompted: what precedes each trained turn is a prompt that ``generate`` can be given.
        only_last: earlier turns should be trained too, but the template does not let them be told.
    """

    segments: Segments
    is_prompted: bool = True
    only_last: bool = False


def prompt_of_json(value: list[Any]) -> Segments:
    """What ``Segments.to_json`` returned."""
    rendered, parts, cuts, moved, known = value
    segments = tuple(Segment(text, False, special_id) for text, special_id in parts)
    return Segments(segments, rendered, tuple(cuts), moved, None if known is None else tuple(known))


def _targets(parts: Sequence[Segment], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The tokens, by their ``offsets`` in the joined texts, that hold a character of a trained part."""
    begins = [*itertools.accumulate((len(part.text) for part in parts), initial=0)]
    trained = _joined([span for part, span in zip(parts, itertools.pairwise(begins), strict=True) if part.trained])
    targets = []
    for begin, end in trained:
        first = bisect_right(offsets, begin, key=itemgetter(1))
        while first > 0 and offsets[first - 1] == (begin, begin):
            first -= 1
        last = first if end < begins[-1] else len(offsets)
        while last < len(offsets) and offsets[last][0] < end:
            last += 1
        targets.append((first, last))
    return targets


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, without empty ones, those that touch made one."""
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        elif begin < end:
            joined.append((begin, end))
    return joined
