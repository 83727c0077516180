"""The bytes of activation checkpointing: plain modules that are run again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from llamatune.memory.ledger import Ledger, Passes, Walk


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
