"""Events of an update and of an evaluation that are done, made from their results and the place of the run."""

from __future__ import annotations

import torch

from llamatune.data.batches import Split
from llamatune.events import EvalDone, StepDone
from llamatune.inference.evaluate import HeldOutLoss
from llamatune.training.run_memory import peak_memory_bytes, peak_reserved_bytes
from llamatune.training.schedule import Schedule
from llamatune.training.trainer_state import TrainerState
from llamatune.training.training_step import Update


def step_done(
    update: Update,
    progress: TrainerState,
    schedule: Schedule,
    learning_rate: float,
    device: torch.device,
    seconds: float,
    elapsed_s: float,
) -> StepDone:
    """Of an ``update`` that took ``seconds`` and is counted in ``progress``."""
    return StepDone(
        step=progress.step,
        total_steps=schedule.total_steps,
        window=progress.window,
        epoch=progress.window / schedule.windows_per_epoch,
        num_epochs=schedule.num_epochs,
        loss=update.loss,
        learning_rate=learning_rate,
        grad_norm=update.grad_norm,
        loss_scale=update.loss_scale,
        target_tokens=update.target_tokens,
        tokens_per_second=update.tokens / max(seconds, 1e-9),
        peak_memory_bytes=peak_memory_bytes(device),
        elapsed_s=elapsed_s,
        peak_reserved_bytes=peak_reserved_bytes(device),
    )


def eval_done(
    result: HeldOutLoss, validation: Split, progress: TrainerState, schedule: Schedule, seconds: float
) -> EvalDone:
    """Of an evaluation that ``progress`` does not count yet."""
    lowest = progress.best_eval_loss is None or result.loss < progress.best_eval_loss
    return EvalDone(
        step=progress.step,
        loss=result.loss,
        perplexity=result.perplexity,
        best=progress.step > 0 and lowest,
        epoch=progress.window / schedule.windows_per_epoch,
        rows=len(validation),
        target_tokens=result.target_tokens,
        seconds=seconds,
    )
