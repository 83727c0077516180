"""Optimizers, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from llamatune.errors import SpecError
from llamatune.spec import TrainingSection
from llamatune.training.adamw_8bit import AdamW8bit


def build_optimizer(spec: TrainingSection, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) in fp32 or 8 bits, or SGD; the learning rate is set before each step."""
    trained = list(parameters)
    if spec.optimizer == "sgd":
        return torch.optim.SGD(
            trained, spec.learning_rate, spec.momentum, weight_decay=spec.weight_decay, nesterov=spec.nesterov
        )
    if spec.optimizer == "adamw_8bit":
        return AdamW8bit(trained, spec.learning_rate, spec.betas, spec.eps, spec.weight_decay)
    return torch.optim.AdamW(trained, spec.learning_rate, spec.betas, spec.eps, spec.weight_decay, fused=True)


def warmup_steps(spec: TrainingSection, total_steps: int) -> int:
    """Updates of linear rise; longer than the run is a ``SpecError``, since the rate would never get there."""
    steps = spec.warmup_steps if spec.warmup_ratio is None else math.ceil(spec.warmup_ratio * total_steps)
    if steps > total_steps:
        raise SpecError(
            f"warm-up of {steps} steps is longer than the run of {total_steps}",
            "training.warmup_steps",
            "lower it, or set training.warmup_ratio",
        )
    return steps


def learning_rate_at(spec: TrainingSection, step: int, total_steps: int) -> float:
    """The rate of the update that follows ``step`` updates.

    Warm-up reaches the full rate at its last update. Then ``constant`` holds it; ``linear`` and ``cosine`` fall to
    ``min_learning_rate`` over what is left (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    warmup = warmup_steps(spec, total_steps)
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    if spec.lr_scheduler == "constant":
        return spec.learning_rate
    share = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = 1 - share if spec.lr_scheduler == "linear" else (1 + math.cos(math.pi * share)) / 2
    return spec.min_learning_rate + (spec.learning_rate - spec.min_learning_rate) * left
