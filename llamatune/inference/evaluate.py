"""Loss and perplexity on rows that are not trained on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llamatune.data.dataset import Split
from llamatune.errors import Stopped
from llamatune.events import ShouldStop, never_stop
from llamatune.model.loss import summed_loss
from llamatune.model.transformer import Transformer


def perplexity(loss: float) -> float:
    """exp(loss), capped where it would overflow: strict JSON has no infinity."""
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class HeldOutLoss:
    """Token-weighted mean loss over a split, in nats."""

    loss: float
    target_tokens: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


@torch.no_grad()
def held_out_loss(
    model: Transformer,
    split: Split,
    batch_size: int,
    autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    should_stop: ShouldStop = never_stop,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOutLoss:
    """Mean loss per target token over every row of ``split``, dropout off; ``Stopped`` when asked to."""
    was_training = model.training
    model.eval()
    total, tokens, done = 0.0, 0, 0
    try:
        for batch in split.batches(batch_size):
            if should_stop():
                raise Stopped("stopped during evaluation")
            with autocast():
                total += float(summed_loss(model, batch.input_ids, batch.labels, batch.lengths))
            tokens += batch.target_tokens
            done += len(batch.rows)
            on_batch(done, len(split))
    finally:
        model.train(was_training)
    return HeldOutLoss(total / tokens, tokens)
