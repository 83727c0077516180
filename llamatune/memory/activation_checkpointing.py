"""Activation checkpointing: the bytes of parts that are run again, and the choice of blocks that recompute."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from llamatune.memory.ledger import Ledger, Passes, Walk
from llamatune.shapes.recompute_levels import Levels, Recompute


def checkpointed(ledger: Ledger, walks: Sequence[Walk], input_bytes: int) -> Passes:
    """Parts of plain modules one after another, of which the first one's input is all that is kept.

    In the backward pass that input counts beside the one that the parts keep when they are run again.
    """
    x = ledger.make("x", input_bytes)
    with ledger.keeping_nothing():
        for walk in walks:
            next(walk(ledger))
    yield
    with ledger.step("again"):
        again = [walk(ledger) for walk in walks]
        for passes in again:
            next(passes)
    for passes in reversed(again):
        next(passes, None)
    ledger.free(x)


def cheapest_levels(layers: int, peak: Callable[[Levels], int], limit: int) -> Levels:
    """As many layers as fit recompute nothing, of the rest as many as fit gate and up, and so on.

    That is the least computation: recomputing a whole block costs least for each byte that it saves, so few layers
    that recompute everything are better than many that recompute a part. The last layers recompute least: their
    backward pass runs while everything else is still kept.
    """

    def fits(levels: Levels) -> bool:
        return peak(levels) <= limit

    above: Levels = ()
    *lighter, heaviest = Recompute
    for level in lighter:
        rest = layers - len(above)
        with_more = [(heaviest,) * (rest - count) + (level,) * count + above for count in range(rest + 1)]
        most = bisect.bisect_left(with_more, True, key=lambda levels: not fits(levels)) - 1
        if most < 0:
            break  # recomputing everything does not fit: a short row on few layers, or nothing fits
        above = with_more[most][rest - most :]
    chosen = (heaviest,) * (layers - len(above)) + above
    if above or fits(chosen):
        return chosen
    evenly = [(level,) * layers for level in Recompute]
    return next(filter(fits, evenly), min(evenly, key=peak))
