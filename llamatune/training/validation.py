"""The validation loss of a run: which weights are best, and when there is no more to hope for."""

from __future__ import annotations

import time
from collections.abc import Iterable

from llamatune.events import EvalDone, OnEvent, Progress, ShouldStop
from llamatune.inference.evaluate import held_out_loss
from llamatune.spec import RunSpec
from llamatune.training.position import Position
from llamatune.training.setup import Inputs, Learner, Schedule


def validate(
    spec: RunSpec,
    inputs: Inputs,
    schedule: Schedule,
    learner: Learner,
    position: Position,
    should_stop: ShouldStop,
    on_event: OnEvent,
) -> EvalDone:
    """Evaluate the weights as they are, on every validation row; ``Stopped`` when asked to."""
    assert inputs.validation is not None
    started = time.monotonic()
    result = held_out_loss(
        learner.model,
        inputs.validation,
        spec.training.micro_batch_size,
        learner.autocast,
        should_stop,
        lambda done, total: on_event(Progress("evaluating", done, total)),
    )
    return EvalDone(
        step=position.step,
        loss=result.loss,
        perplexity=result.perplexity,
        best=position.best_eval_loss is None or result.loss < position.best_eval_loss,
        epoch=position.window / schedule.windows_per_epoch,
        rows=len(inputs.validation),
        target_tokens=result.target_tokens,
        seconds=time.monotonic() - started,
    )


def note_evaluation(spec: RunSpec, position: Position, done: EvalDone) -> None:
    """Enter an evaluation: the lowest loss so far, and whether patience is satisfied."""
    if done.best:
        position.best_eval_loss, position.best_step = done.loss, done.step
    _note_patience(spec, position, done.loss)
    position.evaluated_step = done.step
    position.open_epoch.validation_loss = done.loss
    position.open_epoch.evaluation_s += done.seconds


def _note_patience(spec: RunSpec, position: Position, loss: float) -> None:
    """Compare with the last evaluation that satisfied patience, not with the lowest.

    Small gains that add up to more than min_delta are progress.
    """
    least = spec.evaluation.early_stopping_min_delta
    if position.patience_loss is None or loss < position.patience_loss - least:
        position.patience_loss, position.evaluations_without_improvement = loss, 0
    else:
        position.evaluations_without_improvement += 1


def recount_patience(spec: RunSpec, position: Position, losses: Iterable[float]) -> None:
    """Judge all evaluations of the run anew: its min_delta is another than it was when they were made."""
    position.patience_loss, position.evaluations_without_improvement = None, 0
    for loss in losses:
        _note_patience(spec, position, loss)


def stops_early(spec: RunSpec, position: Position) -> bool:
    """Whether as many evaluations in a row left patience unsatisfied as the spec allows."""
    patience = spec.evaluation.early_stopping_patience
    return patience is not None and position.evaluations_without_improvement >= patience
