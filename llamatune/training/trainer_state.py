"""The trainer's state: step, window, epoch sums, evaluations and patience, as checkpoints keep them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from llamatune.events import EpochDone, EvalDone
from llamatune.formats.state_json import Position
from llamatune.training.early_stopping import count_evaluation
from llamatune.training.training_step import Update
from llamatune.units import perplexity


@dataclass
class OpenEpoch:
    """Sums over the current epoch. ``began_s`` is when it began, on the clock of ``TrainerState.elapsed_s``.

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
class TrainerState:
    """The state of a run between two windows that is saved beside tensors; nothing in it can be derived.

    ``step`` counts updates made, ``window`` accumulation windows consumed (an fp16 overflow consumes one and makes no
    step). Learning rate is a function of ``step``; data order and dropout are functions of (seed, window).
    ``best_eval_loss`` is the lowest; ``patience_loss`` is the one that early stopping compares with. Seconds are those
    of all processes that worked on the run; a checkpoint does not hold the seconds that its own saving took.
    """

    step: int = 0
    window: int = 0
    saved_window: int = 0
    saved_step: int = 0
    evaluated_step: int = 0
    closed_epochs: int = 0
    open_epoch: OpenEpoch = field(default_factory=OpenEpoch)
    best_eval_loss: float | None = None
    best_step: int | None = None
    patience_loss: float | None = None
    evaluations_without_improvement: int = 0
    tokens: int = 0
    training_s: float = 0.0
    elapsed_s: float = 0.0
    skipped_windows: int = 0

    @classmethod
    def restored(cls, saved: Position) -> TrainerState:
        """As a checkpoint has it. What an earlier version did not count of the open epoch begins at 0."""
        values = {name: value for name, value in saved if name not in ("epochs", "open_epoch")}
        return cls(**values, open_epoch=OpenEpoch(**dict(saved.open_epoch)))

    def note_update(self, update: Update, seconds: float) -> None:
        epoch = self.open_epoch
        self.step += 1
        self.window += 1
        self.tokens += update.tokens
        self.training_s += seconds
        epoch.loss += update.loss * update.target_tokens
        epoch.target_tokens += update.target_tokens
        epoch.tokens += update.tokens
        epoch.training_s += seconds

    def note_evaluation(self, done: EvalDone, min_delta: float) -> None:
        """Count an evaluation: the lowest loss so far, and early stopping's patience; before step 1 only its time."""
        self.open_epoch.evaluation_s += done.seconds
        if not done.step:
            return
        if done.best:
            self.best_eval_loss, self.best_step = done.loss, done.step
        self._note_patience(done.loss, min_delta)
        self.evaluated_step = done.step
        self.open_epoch.validation_loss = done.loss

    def note_answers(self, seconds: float) -> None:
        """Count the answers to prompts, which are part of an evaluation, or all of it."""
        self.open_epoch.evaluation_s += seconds
        self.evaluated_step = self.step

    def _note_patience(self, loss: float, min_delta: float) -> None:
        counted = self.patience_loss, self.evaluations_without_improvement
        self.patience_loss, self.evaluations_without_improvement = count_evaluation(loss, *counted, min_delta)

    def recount_patience(self, losses: Iterable[float], min_delta: float) -> None:
        """Count patience again from all validation ``losses``: ``min_delta`` changed since they were computed."""
        self.patience_loss, self.evaluations_without_improvement = None, 0
        for loss in losses:
            self._note_patience(loss, min_delta)

    def close_epoch(self, num_epochs: float, elapsed_s: float) -> EpochDone | None:
        """End the current epoch; None if none of its windows made an update."""
        epoch, self.open_epoch = self.open_epoch, OpenEpoch(began_s=elapsed_s)
        self.closed_epochs += 1
        if not epoch.target_tokens:
            return None
        mean, validation_loss = epoch.loss / epoch.target_tokens, epoch.validation_loss
        return EpochDone(
            epoch=self.closed_epochs,
            train_loss=mean,
            train_perplexity=perplexity(mean),
            validation_loss=validation_loss,
            validation_perplexity=None if validation_loss is None else perplexity(validation_loss),
            epoch_s=elapsed_s - epoch.began_s,
            evaluation_s=epoch.evaluation_s,
            checkpoint_s=epoch.checkpoint_s,
            target_tokens=epoch.target_tokens,
            tokens_per_second=epoch.tokens / max(epoch.training_s, 1e-9),
            num_epochs=num_epochs,
            elapsed_s=elapsed_s,
        )
