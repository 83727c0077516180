"""Saving the state of a run to a checkpoint, and resuming it: weights, optimizer, loss scale, progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llamatune import __version__
from llamatune.checkpoints.run_state import newest_run_state, save_run_state
from llamatune.errors import CheckpointError
from llamatune.formats.state_json import checkpoint_path
from llamatune.training.learner import Learner
from llamatune.training.progress import RunProgress
from llamatune.training.run_directory import RunDirectory
from llamatune.training.run_files import CHECKPOINTS
from llamatune.training.weight_output import WeightOutput


def _machine() -> dict[str, Any]:
    """What rounding depends on beside the spec: sums in another order, by other instructions, give other bits."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": cpu}


def save_checkpoint(run: RunDirectory, weights: WeightOutput, learner: Learner, progress: RunProgress) -> Path:
    """Write ``checkpoints/step-000100`` durably, after the metrics log; its path."""
    path = checkpoint_path(run.path / CHECKPOINTS, progress.step)
    save_run_state(
        path,
        weights.write_checkpoint,
        learner.optimizer.state_tensors(),
        {
            "step": progress.step,
            "position": asdict(progress),
            "scaler": learner.scaler.state(),
            "metrics_bytes": run.log.sync(),
            "llamatune": __version__,
            **_machine(),
        },
    )
    return path


def load_checkpoint(
    run: RunDirectory, weights: WeightOutput, learner: Learner, warn: Callable[[str], None]
) -> tuple[Path, RunProgress, int] | None:
    """Restore the newest checkpoint that verifies: its path, its progress, and the length of the metrics log then.

    None: there is no checkpoint.
    """
    checkpoint = newest_run_state(run.path / CHECKPOINTS, warn)
    if checkpoint is None:
        return None
    state = checkpoint.progress
    weights.restore(checkpoint.path)
    learner.optimizer.restore(checkpoint.optimizer, checkpoint.path)
    learner.scaler.restore(state["scaler"])
    try:
        progress = RunProgress.restored(state["position"])
    except (KeyError, TypeError) as fault:
        raise CheckpointError(f"its position cannot be read: {fault}", checkpoint.path) from None
    changed = [f"{name} was {state[name]}" for name, now in _machine().items() if state.get(name, now) != now]
    if changed:
        warn(f"not bit-exact on another machine than before: {', '.join(changed)}")
    return checkpoint.path, progress, state["metrics_bytes"]
