"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Position:
    """Where a run stands between two windows: all that is saved beside tensors, and nothing that can be derived.

    ``step`` counts updates made, ``window`` accumulation windows consumed (an fp16 overflow consumes one and makes no
    step). Learning rate is a function of ``step``; data order and dropout are functions of (seed, window).
    """

    step: int = 0
    window: int = 0
    saved_window: int = 0
    saved_step: int = 0
    evaluated_step: int = 0
    closed_epochs: int = 0
    epoch_loss: float = 0.0
    epoch_target_tokens: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_eval_loss: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
    tokens: int = 0
    training_s: float = 0.0
    elapsed_s: float = 0.0
    skipped_windows: int = 0

    def reopen_epoch(self) -> None:
        """Take back that the last epoch was closed."""
        last = self.epochs.pop()
        self.closed_epochs -= 1
        self.epoch_target_tokens = last["target_tokens"]
        self.epoch_loss = last["train_loss"] * self.epoch_target_tokens
