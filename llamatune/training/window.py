"""One accumulation window: the gradient of its rows, weighted by target tokens, and the update that it makes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamatune.checkpoints.tensor_bytes import is_finite
from llamatune.data.dataset import Batch
from llamatune.errors import Stopped
from llamatune.events import ShouldStop, never_stop
from llamatune.model.loss import summed_loss
from llamatune.seeds import derived_seed
from llamatune.training.setup import Learner

LOWEST_LOSS_SCALE = 1e-4
"""Where halving is given up: a gradient that overflows fp16 even then overflows at any scale."""

FINISHING_S = 15.0
"""How long a window that was asked to stop may go on. Slurm kills after 30 s, and saving takes a while too."""


@dataclass(frozen=True)
class WindowGradient:
    """What one window's backward passes left in ``.grad``, unscaled and not yet clipped.

    ``loss`` is the mean over the window's ``target_tokens``; ``tokens`` counts no padding; ``bad_rows`` are the row
    numbers of the micro-batches whose loss is not finite.
    """

    loss: float
    target_tokens: int
    tokens: int
    norm: Tensor
    loss_scale: float
    bad_rows: tuple[int, ...]

    @property
    def grad_norm(self) -> float:
        return float(self.norm)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.grad_norm)


def accumulate_gradient(
    learner: Learner, micro_batches: Sequence[Batch], seed: int, window: int, should_stop: ShouldStop = never_stop
) -> WindowGradient:
    """Sum the gradient of every micro-batch's summed loss over the window's target tokens.

    Dropout is a function of (seed, window, micro-batch). The device is waited for once, at the end.

    Raises:
        Stopped: ``should_stop`` said so, and what is left of the window would take too long, by what went before.
    """
    target_tokens, loss_scale = sum(batch.target_tokens for batch in micro_batches), learner.scaler.scale
    losses, started = [], time.monotonic()
    for index, batch in enumerate(micro_batches):
        if index and should_stop():
            left_s = (time.monotonic() - started) / index * (len(micro_batches) - index)
            if left_s > FINISHING_S:
                raise Stopped(f"after {index} of the {len(micro_batches)} micro-batches of a window")
        torch.manual_seed(derived_seed(seed, "dropout", window, index))
        with learner.autocast():
            loss = summed_loss(learner.model, batch.input_ids, batch.labels, batch.lengths)
        (loss / (target_tokens / loss_scale)).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    gradients = [p.grad for p in learner.parameters.values() if p.grad is not None]
    learner.scaler.unscale(gradients)
    norm = torch.nn.utils.get_total_norm(gradients)
    summed = torch.stack(losses).double().tolist()
    bad = [batch for batch, loss in zip(micro_batches, summed, strict=True) if not math.isfinite(loss)]
    return WindowGradient(
        sum(summed) / target_tokens,
        target_tokens,
        sum(batch.tokens for batch in micro_batches),
        norm,
        loss_scale,
        tuple(sorted(row for batch in bad for row in batch.rows)),
    )


def make_update(learner: Learner, gradient: WindowGradient, learning_rate: float, max_grad_norm: float | None) -> None:
    """Clip (Pascanu et al. 2013), step, and clear the gradient."""
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(learner.parameters.values(), max_grad_norm, gradient.norm)
    learner.optimizer.step(learning_rate)
    learner.scaler.grow()
    learner.optimizer.zero_grad()


def layer_grad_norms(learner: Learner) -> dict[str, float]:
    """The gradient's norm by block (``layers.0`` ...) and by module outside of them; the device is waited for once."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in learner.parameters.items():
        if parameter.grad is not None:
            path = name.removeprefix("model.").split(".")
            gradients.setdefault(".".join(path[: 2 if path[0] == "layers" else 1]), []).append(parameter.grad)
    norms = torch.stack([torch.nn.utils.get_total_norm(tensors) for tensors in gradients.values()])
    return dict(zip(gradients, norms.tolist(), strict=True))


def skip_update(learner: Learner) -> float:
    """After an fp16 overflow: clear the gradient and lower the loss scale, which is returned."""
    learner.scaler.back_off()
    learner.optimizer.zero_grad()
    return learner.scaler.scale


def names_without_gradient(learner: Learner) -> list[str]:
    """Trained tensors that no gradient reached; a silent None would train nothing."""
    return [name for name, parameter in learner.parameters.items() if parameter.grad is None]


def names_not_finite(learner: Learner) -> list[str]:
    """Trained tensors that an update made NaN or infinite, though its gradient was finite."""
    return [name for name, parameter in learner.parameters.items() if not is_finite(parameter)]
