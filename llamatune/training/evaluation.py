"""The validation loss of a run at a place of it, as an event."""

from __future__ import annotations

import math
import time

from llamatune.data.batches import Split
from llamatune.errors import NumericsError
from llamatune.events import EvalDone, OnEvent, ShouldStop
from llamatune.inference.evaluate import held_out_loss
from llamatune.ranks import Ranks
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.schedule import Schedule
from llamatune.training.trainer_state import TrainerState
from llamatune.training.training_step import name_rows


def evaluate(
    learner: Learner,
    validation: Split,
    progress: TrainerState,
    schedule: Schedule,
    batch_size: int,
    should_stop: ShouldStop,
    on_event: OnEvent,
    ranks: Ranks,
) -> EvalDone:
    """Compute the validation loss; ``progress`` does not count it yet. That before the first step is never the best.

    Raises:
        NumericsError: it is not finite. Stopped: ``should_stop`` asked for it.
    """
    started, idle = time.monotonic(), learner.idle_forward
    result = held_out_loss(learner.model, validation, batch_size, learner.autocast, on_event, should_stop, ranks, idle)
    if not math.isfinite(result.loss):
        raise NumericsError("the validation loss is not finite", f"validation {name_rows(result.broken)}")
    return EvalDone(
        step=progress.step,
        loss=result.loss,
        perplexity=result.perplexity,
        best=progress.step > 0 and (progress.best_eval_loss is None or result.loss < progress.best_eval_loss),
        epoch=progress.window / schedule.windows_per_epoch,
        rows=len(validation),
        target_tokens=result.target_tokens,
        seconds=time.monotonic() - started,
    )
