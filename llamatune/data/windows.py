"""Windows of a long document: its tokens in rows of bounded length, each token a target once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """A row of a document: its tokens, and its targets as (first, last + 1). ``repeated``: tokens that are context."""

    ids: list[int]
    targets: list[tuple[int, int]]
    repeated: int


def split_windows(
    ids: Sequence[int], targets: Sequence[tuple[int, int]], beginning: int, most: int, overlap: int
) -> list[Window]:
    """The windows of a document of more than ``most`` tokens; each has at most that many.

    Each window starts with the ``beginning`` tokens (BOS, or none) and, but for the first, with ``overlap`` tokens of
    the one before, which are context and no targets. Without a BOS that is one token at least, since nothing predicts a
    row's first token. An EOS that would stand alone in the last window gets as much context as there is room.
    """
    overlap, room = max(overlap, 0 if beginning else 1), most - beginning
    windows, done = list[Window](), beginning
    while done < len(ids):
        begin = max(beginning, done - overlap)
        if begin == len(ids) - 1:
            begin = max(beginning, len(ids) - room)
        end = min(len(ids), begin + room)
        shift = beginning - begin
        inside = [(max(first, done) + shift, min(last, end) + shift) for first, last in targets]
        own = [(first, last) for first, last in inside if first < last]
        windows.append(Window([*ids[:beginning], *ids[begin:end]], own, done - begin))
        done = end
    return windows
