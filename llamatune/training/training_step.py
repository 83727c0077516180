"""One training step: the gradient of an accumulation window, clipping, the optimizer's step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llamatune.data.batches import Batch
from llamatune.errors import NumericsError
from llamatune.ranks import ALONE, Ranks
from llamatune.shapes.gradient_lanes import LANES
from llamatune.spec_sections import TrainingSection
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.stopping import Stopping
from llamatune.training.window_gradients import window_gradients

LOWEST_LOSS_SCALE = 1e-4
"""Where halving ends: a gradient that overflows fp16 even at this scale overflows at any."""


@dataclass(frozen=True)
class Update:
    """What a window came to. It made no update (``made``) if its gradient overflowed fp16.

    ``loss`` is the mean over ``target_tokens``; ``tokens`` counts no padding; ``grad_norm`` is that before clipping;
    ``loss_scale`` is the one that was used; ``layer_grad_norms``: None without ``training.log_layer_grad_norms``;
    ``stop``: some rank says that the run stops. ``own_tokens`` were computed by this rank; ``waited_s`` is its time in
    messages between ranks.
    """

    made: bool
    loss: float
    target_tokens: int
    tokens: int
    grad_norm: float
    loss_scale: float
    layer_grad_norms: dict[str, float] | None
    stop: bool
    own_tokens: int
    waited_s: float


def make_update(
    learner: Learner,
    passes: Sequence[Batch],
    training: TrainingSection,
    window: int,
    learning_rate: float,
    stopping: Stopping | None = None,
    lanes: int | None = LANES,
    ranks: Ranks = ALONE,
) -> Update:
    """Train on one window. No weight changes where a loss or gradient is not finite, or a gradient is missing.

    The gradient is that of the summed loss over the window's target tokens, so no split into passes changes it.
    Dropout is a function of (seed, window, pass).

    Raises:
        NumericsError: a loss or gradient is not finite, also with another loss scale, or a gradient is missing.
        Stopped: ``stopping`` gave the window up.
    """
    scaler, parameters = learner.scaler, learner.parameters
    target_tokens, loss_scale = sum(batch.target_tokens for batch in passes), scaler.scale
    facts = window_gradients(learner, passes, training.seed, window, lanes, stopping or Stopping(), ranks)
    missing = facts.missing
    gradients = {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    scaler.unscale(list(gradients.values()))
    joined = nn.Identity() if learner.sharded is None else learner.sharded.joined_norms
    norm = joined(torch.nn.utils.get_total_norm(gradients.values()))
    by_layer = _by_layer(gradients) if training.log_layer_grad_norms else {}
    norms = [norm.view(1)]
    if by_layer:
        norms.append(joined(torch.stack([torch.nn.utils.get_total_norm(tensors) for tensors in by_layer.values()])))
    # The device is waited for here, and nowhere else in the window of one process.
    numbers = torch.cat([facts.losses, *(part.to(facts.losses) for part in norms)]).tolist()
    losses, grad_norm, layer_norms = numbers[: len(passes)], numbers[len(passes)], numbers[len(passes) + 1 :]
    layer_grad_norms = dict(zip(by_layer, layer_norms, strict=True)) if by_layer else None
    bad = [batch for batch, loss in zip(passes, losses, strict=True) if not math.isfinite(loss)]
    made = not bad and math.isfinite(grad_norm) and not missing
    if made:
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
        raise NumericsError("the gradient is not finite", _rows_of(passes))
    if not math.isfinite(grad_norm) and scaler.scale < LOWEST_LOSS_SCALE:
        raise NumericsError("the gradient overflows fp16 at any loss scale", _rows_of(passes))
    if math.isfinite(grad_norm) and missing:
        raise NumericsError(f"no gradient reached {missing[0]} and {len(missing) - 1} others")
    return Update(
        made, sum(losses) / target_tokens, target_tokens, sum(batch.tokens for batch in passes), grad_norm, loss_scale,
        layer_grad_norms, facts.stop, facts.own_tokens, facts.waited_s,
    )  # fmt: skip


def _rows_of(batches: Sequence[Batch]) -> str:
    """The first row numbers of a few passes, for a message."""
    return name_rows([row for batch in batches for row in batch.rows])


def name_rows(numbers: Iterable[int]) -> str:
    """``rows 3, 5``, the first eight."""
    rows = sorted(numbers)
    return f"rows {', '.join(map(str, rows[:8]))}" + (" ..." if len(rows) > 8 else "")


def _by_layer(gradients: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """The gradients of each block (``layers.0`` ...) and of each module outside of them."""
    by_layer: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        path = name.removeprefix("model.").split(".")
        by_layer.setdefault(".".join(path[: 2 if path[0] == "layers" else 1]), []).append(gradient)
    return by_layer
