"""One accumulation window: the gradient of its rows, weighted by target tokens, and the update that it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamatune.data.dataset import Batch
from llamatune.model.loss import summed_loss
from llamatune.seeds import derived_seed
from llamatune.training.setup import Learner


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


def accumulate_gradient(learner: Learner, micro_batches: Sequence[Batch], seed: int, window: int) -> WindowGradient:
    """Sum the gradient of every micro-batch's summed loss over the window's target tokens.

    Dropout is a function of (seed, window, micro-batch). The device is waited for once, at the end.
    """
    target_tokens = sum(batch.target_tokens for batch in micro_batches)
    losses = []
    for index, batch in enumerate(micro_batches):
        torch.manual_seed(derived_seed(seed, "dropout", window, index))
        with learner.autocast():
            loss = summed_loss(learner.model, batch.input_ids, batch.labels, batch.lengths)
        learner.scaler.scale(loss / target_tokens).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    loss_scale = learner.scaler.get_scale()
    learner.scaler.unscale_(learner.optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in learner.parameters.values() if p.grad is not None])
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
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate
    learner.optimizer.step()
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)


def skip_update(learner: Learner) -> float:
    """After an fp16 overflow: clear the gradient and lower the loss scale, which is returned."""
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    return learner.scaler.get_scale()


def names_without_gradient(learner: Learner) -> list[str]:
    """Trained tensors that no gradient reached; a silent None would train nothing."""
    return [name for name, parameter in learner.parameters.items() if parameter.grad is None]


def names_not_finite(learner: Learner) -> list[str]:
    """Trained tensors that an update made NaN or infinite, though its gradient was finite."""
    return [name for name, parameter in learner.parameters.items() if not torch.isfinite(parameter).all()]
