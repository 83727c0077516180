"""What a run tells of itself: before its first step, and when it is done."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamatune.devices import memory_size_bytes
from llamatune.events import MemoryHeld, Notice, OnEvent, RunStarted
from llamatune.spec import RunSpec
from llamatune.training.memory import peak_memory_bytes, peak_reserved_bytes
from llamatune.training.position import Position
from llamatune.training.setup import Inputs, Learner, Schedule


def announce(
    spec: RunSpec, inputs: Inputs, schedule: Schedule, position: Position, device: torch.device, on_event: OnEvent
) -> None:
    """Report what is about to be trained, and from which step on."""
    samples = len(inputs.prepared.train)
    if spec.data.packing:
        per_step = samples / schedule.windows_per_epoch
        limit = spec.data.packed_tokens
        message = f"packing: {samples:,} samples in {schedule.rows:,} rows of at most {limit:,} tokens"
        on_event(Notice(f"{message}, about {per_step:,.1f} samples in each update"))
    on_event(
        RunStarted(
            inputs.count.trainable_parameters,
            inputs.count.total_parameters,
            samples,
            0 if inputs.validation is None else len(inputs.validation),
            schedule.total_steps,
            schedule.num_epochs,
            position.step,
            str(device),
            position.elapsed_s,
        )
    )


def early_stop(position: Position, schedule: Schedule) -> str:
    """Why a run ended before its last step, in one line."""
    count, best = position.evaluations_without_improvement, position.best_step
    return (
        f"stopped early after step {position.step} of {schedule.total_steps}: no lower validation loss in {count} "
        f"evaluations, the lowest was {position.best_eval_loss:.4f} at step {best}; with a larger "
        "evaluation.early_stopping_patience the same command goes on"
    )


def held_memory(learner: Learner) -> MemoryHeld:
    """What the learner keeps between updates; storage that tensors share counts once."""
    trained = list(learner.parameters.values())
    states = [value for state in learner.optimizer.state.values() for value in state.values()]
    trained_bytes = _storage_bytes(trained)
    return MemoryHeld(
        frozen_bytes=_storage_bytes([*learner.model.parameters(), *learner.model.buffers()]) - trained_bytes,
        trained_bytes=trained_bytes,
        optimizer_bytes=_storage_bytes([value for value in states if isinstance(value, Tensor)]),
        device_bytes=memory_size_bytes(learner.device),
    )


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def summarise(
    inputs: Inputs,
    position: Position,
    device: torch.device,
    *,
    runtime_s: float,
    stopped_early: bool,
    output_dir: Path,
) -> dict[str, Any]:
    """What ``summary.json`` holds."""
    count = inputs.count
    return {
        "steps": position.step,
        "train_loss": position.epochs[-1]["train_loss"] if position.epochs else None,
        "best_eval_loss": position.best_eval_loss,
        "best_step": position.best_step,
        "trainable_parameters": count.trainable_parameters,
        "total_parameters": count.total_parameters,
        "trainable_percent": round(count.trainable_percent, 4),
        "peak_memory_bytes": peak_memory_bytes(device),
        "peak_reserved_bytes": peak_reserved_bytes(device),
        "device": str(device),
        "runtime_s": runtime_s,
        "tokens_per_second": position.tokens / max(position.training_s, 1e-9),
        "epochs": position.epochs,
        "skipped_windows": position.skipped_windows,
        "stopped_early": stopped_early,
        "output_dir": str(output_dir),
    }
