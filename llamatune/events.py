"""What the core reports while it works. Observers draw or store events; they cannot alter the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Notice:
    """Something the user should know, in one line. ``kind`` is ``info`` or ``warning``."""

    message: str
    kind: str = "info"


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` units of ``task`` (total None: unknown)."""

    task: str
    done: int
    total: int | None = None


@dataclass(frozen=True)
class RunStarted:
    """What is about to be trained; ``resumed_step`` is the optimizer step the run continues from."""

    trainable_parameters: int
    total_parameters: int
    train_rows: int
    validation_rows: int
    total_steps: int
    num_epochs: int
    resumed_step: int
    device: str


@dataclass(frozen=True)
class StepDone:
    """One optimizer update. ``loss`` is the mean over the target tokens of the whole accumulation window."""

    step: int
    total_steps: int
    window: int
    epoch: float
    num_epochs: int
    loss: float
    learning_rate: float
    grad_norm: float
    loss_scale: float
    target_tokens: int
    tokens_per_second: float
    peak_memory_bytes: int
    elapsed_s: float


@dataclass(frozen=True)
class StepSkipped:
    """An fp16 overflow: the window was consumed, no update was made, and ``loss_scale`` is the lowered scale."""

    window: int
    loss_scale: float


@dataclass(frozen=True)
class EvalDone:
    """Token-weighted validation loss after ``step`` updates."""

    step: int
    loss: float
    perplexity: float
    best: bool


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is durable at ``path``; ``seconds`` is what saving took."""

    step: int
    path: str
    seconds: float


@dataclass(frozen=True)
class EpochDone:
    """Token-weighted means of one whole epoch."""

    epoch: int
    num_epochs: int
    train_loss: float
    train_perplexity: float
    elapsed_s: float


Event = Notice | Progress | RunStarted | StepDone | StepSkipped | EvalDone | CheckpointSaved | EpochDone
OnEvent = Callable[[Event], None]
ShouldStop = Callable[[], bool]


def ignore_event(event: Event) -> None:
    """An observer that looks away."""


def never_stop() -> bool:
    """A stop request that never comes."""
    return False
