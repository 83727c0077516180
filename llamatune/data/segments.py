"""Segments of a row: texts and special tokens in turn, each a target of the loss or not; their ids and targets."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from llamatune.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Segment:
    """A text, or a special token with its id. ``trained``: its tokens are targets."""

    text: str
    trained: bool = False
    special_id: int | None = None


@dataclass(frozen=True, slots=True)
class Segments:
    """A row or a prompt.

    ``rendered``: by a chat template, so that texts and special tokens are encoded in one call; otherwise each text is
    encoded for itself, as a beginning.
    """

    parts: tuple[Segment, ...]
    rendered: bool = False

    @property
    def shown(self) -> str:
        """The text, with the special tokens that a chat template writes, but no BOS that the tokenizer puts."""
        return "".join(part.text for part in self.parts if self.rendered or part.special_id is None)

    def to_json(self) -> list[Any]:
        """A prompt as JSON values; ``prompt_of_json`` reads them back."""
        return [self.rendered, [(part.text, part.special_id) for part in self.parts]]

    def encode(self, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and the targets among them as (first, last + 1); no two of them touch.

        A token is a target if it holds any character of a trained text. Several tokens of one character are where the
        character is. Text before the first target is encoded with it, so its tokens may differ from those that it has
        alone.
        """
        if self.rendered:
            ids, offsets = tokenizer.encode_mixed([(part.text, part.special_id) for part in self.parts])
            return ids, _joined(_targets(self.parts, offsets))
        ids, targets = list[int](), list[tuple[int, int]]()
        for is_special, group in itertools.groupby(self.parts, key=lambda part: part.special_id is not None):
            run, start = list(group), len(ids)
            if is_special:
                ids += [part.special_id for part in run if part.special_id is not None]
                targets += [(start + n, start + n + 1) for n, part in enumerate(run) if part.trained]
            elif len({part.trained for part in run if part.text}) < 2:  # offsets take time
                ids += tokenizer.encode("".join(part.text for part in run))[len(tokenizer.beginning) :]
                if any(part.trained and part.text for part in run) and start < len(ids):
                    targets.append((start, len(ids)))
            else:
                found, offsets = tokenizer.encode_with_offsets("".join(part.text for part in run))
                ids += found
                targets += [(start + first, start + last) for first, last in _targets(run, offsets)]
        return ids, _joined(targets)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row in segments.

    Args:
        prompt_ends: the parts before each of these are what ``generate`` is given for one of the trained turns.
        is_prompted: there is such a prompt for every trained turn.
        only_last: earlier turns should be trained too, but the template does not let them be told.
    """

    segments: Segments
    prompt_ends: tuple[int, ...]
    is_prompted: bool = True
    only_last: bool = False


def prompt_segments(tokenizer: Tokenizer, prompt: str) -> Segments:
    """BOS, where one is put, and a prompt."""
    bos = tokenizer.bos_id
    begin = () if bos is None else (Segment(tokenizer.piece(bos), False, bos),)
    return Segments((*begin, Segment(prompt)))


def prompt_of_json(value: list[Any]) -> Segments:
    """What ``Segments.to_json`` returned."""
    rendered, parts = value
    return Segments(tuple(Segment(text, False, special_id) for text, special_id in parts), rendered)


def in_segments(tokenizer: Tokenizer, prompt: str, completion: str, *, trained: bool = True) -> Segments:
    """BOS, where one is put, a prompt, its completion and EOS; the last two are ``trained``."""
    eos = tokenizer.eos_id
    end = Segment(completion, trained), Segment(tokenizer.piece(eos), trained, eos)
    return Segments((*prompt_segments(tokenizer, prompt).parts, *end))


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
