"""The bytes of ``model.checkpointing``: parts that torch's checkpointing runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

from llamatune.memory.ledger import Ledger, Tensor, Walk


class Checkpointed:
    """Parts one after another, of which the first one's input of ``input_bytes`` is all that is kept.

    In the backward pass that input counts beside the one that the parts keep when they are run again.
    """

    def __init__(self, walks: Sequence[Walk], input_bytes: int) -> None:
        self.walks, self.input_bytes = walks, input_bytes

    def forward(self, ledger: Ledger) -> Tensor:
        x = ledger.make("x", self.input_bytes)
        ledger.keeping = False
        for walk in self.walks:
            walk.forward(ledger)  # what it keeps has no bytes
        ledger.keeping = True
        return x

    def backward(self, ledger: Ledger, x: Tensor) -> None:
        with ledger.step("again"):
            saved = [walk.forward(ledger) for walk in self.walks]
        for walk, kept in zip(reversed(self.walks), reversed(saved), strict=True):
            walk.backward(ledger, kept)
        ledger.free(x)
