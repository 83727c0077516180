"""One update: gradient accumulation over the micro-batches of a window, clipping, the optimizer's step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llamatune.data.batches import Batch
from llamatune.errors import Stopped
from llamatune.events import ShouldStop, never_stop
from llamatune.model.loss import summed_loss
from llamatune.seeds import derived_seed
from llamatune.spec import TrainingSection
from llamatune.training.learner import Learner

LOWEST_LOSS_SCALE = 1e-4
"""Where halving ends: a gradient that overflows fp16 even at this scale overflows at any."""

FINISHING_S = 15.0
"""How long a window may go on after a stop was asked for. Slurm kills after 30 s, and saving takes a while too."""


@dataclass(frozen=True)
class Update:
    """What a window came to, and whether it made an update (``made``).

    ``loss`` is the mean over ``target_tokens``; ``tokens`` counts no padding; ``grad_norm`` is that before clipping;
    ``loss_scale`` is the one that was used. ``bad_rows`` are the row numbers of the micro-batches whose loss is not
    finite. ``without_gradient`` names the trained tensors that no gradient reached. ``layer_grad_norms`` are filled
    where ``training.log_layer_grad_norms`` asks for them.
    """

    made: bool
    loss: float
    target_tokens: int
    tokens: int
    grad_norm: float
    loss_scale: float
    bad_rows: tuple[int, ...]
    without_gradient: tuple[str, ...]
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
    without = tuple(name for name, parameter in parameters.items() if parameter.grad is None)
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    scaler.unscale(gradients)
    norm = torch.nn.utils.get_total_norm(gradients)
    values = torch.stack(losses).double().tolist()  # the device is waited for here, once
    bad = [batch for batch, value in zip(micro_batches, values, strict=True) if not math.isfinite(value)]
    grad_norm, layer_grad_norms = float(norm), None
    made = not bad and math.isfinite(grad_norm) and not without
    if made:
        if training.log_layer_grad_norms:
            layer_grad_norms = _layer_grad_norms(parameters)
        if training.max_grad_norm is not None:  # Pascanu et al. 2013
            torch.nn.utils.clip_grads_with_norm_(parameters.values(), training.max_grad_norm, norm)
        learner.optimizer.step(learning_rate)
        scaler.grow()
    else:
        scaler.back_off()
    learner.optimizer.zero_grad()
    return Update(
        made,
        sum(values) / target_tokens,
        target_tokens,
        sum(batch.tokens for batch in micro_batches),
        grad_norm,
        loss_scale,
        tuple(sorted(row for batch in bad for row in batch.rows)),
        without,
        layer_grad_norms,
    )


def _layer_grad_norms(parameters: dict[str, nn.Parameter]) -> dict[str, float]:
    """The gradient's norm by block (``layers.0`` ...) and by module outside of them; the device is waited for once."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            path = name.removeprefix("model.").split(".")
            gradients.setdefault(".".join(path[: 2 if path[0] == "layers" else 1]), []).append(parameter.grad)
    norms = torch.stack([torch.nn.utils.get_total_norm(tensors) for tensors in gradients.values()])
    return dict(zip(gradients, norms.tolist(), strict=True))
