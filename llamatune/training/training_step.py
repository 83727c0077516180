"""One training step: gradient accumulation over the micro-batches of a window, clipping, the optimizer's step."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamatune.data.batches import Batch
from llamatune.errors import NumericsError, Stopped
from llamatune.events import ShouldStop, never_stop
from llamatune.model.loss import summed_loss
from llamatune.seeds import derived_seed
from llamatune.spec import TrainingSection
from llamatune.training.model_and_optimizer import Learner

LOWEST_LOSS_SCALE = 1e-4
"""Where halving ends: a gradient that overflows fp16 even at this scale overflows at any."""

FINISHING_S = 15.0
"""How long a window may go on after a stop was asked for. Slurm kills after 30 s, and saving takes a while too."""


@dataclass(frozen=True)
class Update:
    """What a window came to. It made no update (``made``) if its gradient overflowed fp16.

    ``loss`` is the mean over ``target_tokens``; ``tokens`` counts no padding; ``grad_norm`` is that before clipping;
    ``loss_scale`` is the one that was used; ``layer_grad_norms``: None without ``training.log_layer_grad_norms``.
    """

    made: bool
    loss: float
    target_tokens: int
    tokens: int
    grad_norm: float
    loss_scale: float
    layer_grad_norms: dict[str, float] | None


def make_update(
    learner: Learner,
    micro_batches: Sequence[Batch],
    training: TrainingSection,
    window: int,
    learning_rate: float,
    should_stop: ShouldStop = never_stop,
) -> Update:
    """Train on one window. No weight changes where a loss or gradient is not finite, or a gradient is missing.

    The gradient is that of the summed loss over the window's target tokens, so no split into micro-batches changes it.
    Dropout is a function of (seed, window, micro-batch).

    Raises:
        NumericsError: a loss or gradient is not finite, also with another loss scale, or a gradient is missing.
        Stopped: ``should_stop`` asked for it, and the rest of the window would take longer than ``FINISHING_S``.
    """
    scaler, parameters = learner.scaler, learner.parameters
    target_tokens, loss_scale = sum(batch.target_tokens for batch in micro_batches), scaler.scale
    losses, started = [], time.monotonic()
    for index, batch in enumerate(micro_batches):
        if index and should_stop():
            left_s = (time.monotonic() - started) / index * (len(micro_batches) - index)
            if left_s > FINISHING_S:
                raise Stopped(f"after {index} of the {len(micro_batches)} micro-batches of a window")
        torch.manual_seed(derived_seed(training.seed, "dropout", window, index))
        with learner.autocast():
            loss = summed_loss(learner.model, batch.input_ids, batch.labels, batch.lengths)
        (loss / (target_tokens / loss_scale)).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    del loss  # and with it the graph
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    missing = [name for name in parameters if name not in gradients]
    scaler.unscale(list(gradients.values()))
    norm = torch.nn.utils.get_total_norm(gradients.values())
    values = torch.stack(losses).double().tolist()  # the device is waited for here, once
    bad = [batch for batch, value in zip(micro_batches, values, strict=True) if not math.isfinite(value)]
    grad_norm, layer_grad_norms = float(norm), None
    made = not bad and math.isfinite(grad_norm) and not missing
    if made:
        if training.log_layer_grad_norms:
            layer_grad_norms = _layer_grad_norms(gradients)
        if training.max_grad_norm is not None:  # Pascanu et al. 2013
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), training.max_grad_norm, norm)
        learner.optimizer.step(learning_rate)
        scaler.grow()
    else:
        scaler.back_off()
    learner.optimizer.zero_grad()
    if bad:
        raise NumericsError("the loss is not finite", _rows_of(bad))
    if not math.isfinite(grad_norm) and not scaler.enabled:
        raise NumericsError("the gradient is not finite", _rows_of(micro_batches))
    if not math.isfinite(grad_norm) and scaler.scale < LOWEST_LOSS_SCALE:
        raise NumericsError("the gradient overflows fp16 at any loss scale", _rows_of(micro_batches))
    if math.isfinite(grad_norm) and missing:
        raise NumericsError(f"no gradient reached {missing[0]} and {len(missing) - 1} others")
    tokens = sum(batch.tokens for batch in micro_batches)
    return Update(made, sum(values) / target_tokens, target_tokens, tokens, grad_norm, loss_scale, layer_grad_norms)


def _rows_of(batches: Sequence[Batch]) -> str:
    """The first row numbers of a few micro-batches, for a message."""
    rows = sorted(row for batch in batches for row in batch.rows)
    return f"rows {', '.join(map(str, rows[:8]))}" + (" ..." if len(rows) > 8 else "")


def _layer_grad_norms(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """The gradient's norm by block (``layers.0`` ...) and by module outside of them; the device is waited for once."""
    by_layer: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        path = name.removeprefix("model.").split(".")
        by_layer.setdefault(".".join(path[: 2 if path[0] == "layers" else 1]), []).append(gradient)
    norms = torch.stack([torch.nn.utils.get_total_norm(tensors) for tensors in by_layer.values()])
    return dict(zip(by_layer, norms.tolist(), strict=True))
