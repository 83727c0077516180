"""Ranks that share full fine-tuning wrongly, each in one way; a warm run can be given one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from llamatune.checkpoints.checkpoint import Checkpoint
from llamatune.checkpoints.huggingface_weights import HuggingFaceCheckpoint
from llamatune.training import model_and_optimizer, window_gradients
from llamatune.training.optimizers.adamw_8bit import AdamW8bit


def blocks_of_slices() -> None:
    """8-bit state in blocks of each rank's slice, not of the whole tensor."""
    model_and_optimizer.ShardedAdamW8bit = lambda betas, eps, decay, *_: AdamW8bit(betas, eps, decay)


def idle_pass_that_counts() -> None:
    """The pass of a rank that has fewer than the others adds to the gradient."""
    window_gradients.math = SimpleNamespace(inf=100.0)


def mean_of_ranks() -> None:
    """The gradient is the mean over the ranks, not the sum."""
    backward = window_gradients._backward

    def scaled(learner: Any, batch: Any, seed: int, divisor: float) -> Tensor:
        return backward(learner, batch, seed, divisor * int(os.environ.get("WORLD_SIZE", "1")))

    window_gradients._backward = scaled


def own_norm() -> None:
    """Each rank clips by the norm of its own slices."""
    model_and_optimizer.ShardedModel.joined_norms = lambda self, norms: norms


def log_reads() -> None:
    """What is loaded of the base: the elements of each reading, in the file ``LOG_READS`` with the rank as suffix."""
    path = Path(os.environ["LOG_READS"] + "." + os.environ.get("RANK", "0"))
    rows_of, load = HuggingFaceCheckpoint.rows, model_and_optimizer.load_rows

    def rows(self: Checkpoint, name: str, rows: Sequence[int]) -> Tensor:
        found = rows_of(self, name, rows)
        with path.open("a") as file:
            file.write(json.dumps(found.numel()) + "\n")
        return found

    def whole(*_: Any) -> Tensor:
        raise AssertionError("reads a whole tensor")

    def logging(*arguments: Any) -> list[str]:
        HuggingFaceCheckpoint.rows, HuggingFaceCheckpoint.tensor = rows, whole
        return load(*arguments)

    model_and_optimizer.load_rows = logging
