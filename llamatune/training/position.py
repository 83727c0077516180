"""Where a run stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from llamatune.events import EpochDone
from llamatune.units import perplexity


def _facts(done: EpochDone) -> dict[str, Any]:
    """What the summary keeps of an epoch."""
    facts = asdict(done)
    del facts["num_epochs"], facts["elapsed_s"]
    return facts


@dataclass
class OpenEpoch:
    """Sums over the epoch under way. ``began_s`` is when it began, on the clock that ``Position.elapsed_s`` reads.

    ``loss`` is summed over target tokens; ``validation_loss`` is that of the last evaluation inside the epoch.
    """

    began_s: float = 0.0
    loss: float = 0.0
    target_tokens: int = 0
    tokens: int = 0
    training_s: float = 0.0
    evaluation_s: float = 0.0
    checkpoint_s: float = 0.0
    validation_loss: float | None = None


@dataclass
class Position:
    """Where a run stands between two windows: all that is saved beside tensors, and nothing that can be derived.

    ``step`` counts updates made, ``window`` accumulation windows consumed (an fp16 overflow consumes one and makes no
    step). Learning rate is a function of ``step``; data order and dropout are functions of (seed, window).
    ``best_eval_loss`` is the lowest; ``patience_loss`` is what early stopping wants to see lowered. Seconds are those
    of all processes that worked on the run; what a checkpoint took is not yet known inside it.
    """

    step: int = 0
    window: int = 0
    saved_window: int = 0
    saved_step: int = 0
    evaluated_step: int = 0
    closed_epochs: int = 0
    open_epoch: OpenEpoch = field(default_factory=OpenEpoch)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_eval_loss: float | None = None
    best_step: int | None = None
    patience_loss: float | None = None
    evaluations_without_improvement: int = 0
    tokens: int = 0
    training_s: float = 0.0
    elapsed_s: float = 0.0
    skipped_windows: int = 0

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Position:
        """A saved position; ``KeyError`` or ``TypeError`` if it is none.

        One of the first schema is read too: it kept only losses of epochs, so what else is now known of one is counted
        from here on, and None for those that are past. It knew no min_delta: the lowest loss was what patience watched.
        """
        values = dict(saved)
        if "open_epoch" not in values:
            values["open_epoch"] = {
                "began_s": values["elapsed_s"],
                "loss": values.pop("epoch_loss"),
                "target_tokens": values.pop("epoch_target_tokens"),
            }
            known = _facts(EpochDone(0, 0, 0.0, 0.0, 0.0))
            values["epochs"] = [{**dict.fromkeys(known), **epoch} for epoch in values["epochs"]]
            values["patience_loss"] = values["best_eval_loss"]
        return cls(**{**values, "open_epoch": OpenEpoch(**values["open_epoch"])})

    def note_step(self, loss: float, target_tokens: int, tokens: int, seconds: float) -> None:
        """Count one update: the mean ``loss`` of its window, and how long it took."""
        epoch = self.open_epoch
        self.step += 1
        self.window += 1
        self.tokens += tokens
        self.training_s += seconds
        epoch.loss += loss * target_tokens
        epoch.target_tokens += target_tokens
        epoch.tokens += tokens
        epoch.training_s += seconds

    def close_epoch(self, num_epochs: int, elapsed_s: float) -> EpochDone | None:
        """End the epoch under way; None if no window of it made an update."""
        epoch, self.open_epoch = self.open_epoch, OpenEpoch(began_s=elapsed_s)
        self.closed_epochs += 1
        if not epoch.target_tokens:
            return None
        mean, held_out = epoch.loss / epoch.target_tokens, epoch.validation_loss
        done = EpochDone(
            epoch=self.closed_epochs,
            num_epochs=num_epochs,
            train_loss=mean,
            train_perplexity=perplexity(mean),
            elapsed_s=elapsed_s,
            validation_loss=held_out,
            validation_perplexity=None if held_out is None else perplexity(held_out),
            epoch_s=elapsed_s - epoch.began_s,
            evaluation_s=epoch.evaluation_s,
            checkpoint_s=epoch.checkpoint_s,
            target_tokens=epoch.target_tokens,
            tokens_per_second=epoch.tokens / max(epoch.training_s, 1e-9),
        )
        self.epochs.append(_facts(done))
        return done
