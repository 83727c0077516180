"""The event of an update that is done, made from its results and the place of the run."""

from __future__ import annotations

import torch

from llamatune.events import StepDone
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
