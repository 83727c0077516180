"""The summary of a run, and how patience ended it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from llamatune.devices import cpu_facts, gpu_facts
from llamatune.events import EarlyStop, EpochMeans
from llamatune.training.inputs import Inputs
from llamatune.training.run_memory import peak_memory_bytes, peak_reserved_bytes
from llamatune.training.trainer_state import TrainerState


def early_stop_of(progress: TrainerState, epochs: Sequence[EpochMeans]) -> EarlyStop:
    """The last evaluation, at which patience ended the run; its epoch is closed, the last of ``epochs``."""
    assert progress.best_step is not None
    assert progress.best_eval_loss is not None
    losses = [epoch.validation_loss for epoch in epochs if epoch.validation_loss is not None]
    return EarlyStop(
        step=progress.evaluated_step,
        loss=losses[-1] if losses else None,
        evaluations_without_improvement=progress.evaluations_without_improvement,
        best_step=progress.best_step,
        best_eval_loss=progress.best_eval_loss,
    )


def summary_of(
    progress: TrainerState,
    epochs: Sequence[EpochMeans],
    inputs: Inputs,
    device: torch.device,
    gpu_use: Mapping[str, Any],
    loss_at_start: float | None,
    runtime_s: float,
) -> dict[str, Any]:
    """The summary but for how the run ended and what its ranks and its memory plan were."""
    count = inputs.count
    return {
        "steps": progress.step,
        "train_loss": epochs[-1].train_loss if epochs else None,
        "best_eval_loss": progress.best_eval_loss,
        "best_step": progress.best_step,
        "start_eval_loss": loss_at_start,
        "trainable_parameters": count.trainable_parameters,
        "total_parameters": count.total_parameters,
        "trainable_percent": round(count.trainable_percent, 4),
        "peak_memory_bytes": peak_memory_bytes(device),
        "peak_reserved_bytes": peak_reserved_bytes(device),
        "device": str(device),
        "gpu": gpu_facts(device),
        "cpu": cpu_facts(),
        **gpu_use,
        "runtime_s": runtime_s,
        "tokens_per_second": progress.tokens / max(progress.training_s, 1e-9),
        "epochs": [asdict(epoch) for epoch in epochs],
        "skipped_windows": progress.skipped_windows,
    }
