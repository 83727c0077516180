"""Running averages of the loss, and means by epoch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llamatune.events import Step
from llamatune.units import perplexity


def running_average(values: Sequence[float], decay: float) -> list[float]:
    """Exponential moving average, corrected for the bias of its start (Kingma and Ba 2015, algorithm 1).

    m_t = decay · m_(t-1) + (1 - decay) · x_t with m_0 = 0; the result is m_t / (1 - decay^t), so the first is x_1.
    """
    average, weight, averages = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        averages.append(average / weight)
    return averages


def decay_for(count: int) -> float:
    """The decay of a running average that suits a curve of ``count`` values: 0 for none, 0.42 for 20, 0.9 from 200 on.

    It is LLaMA-Factory's (``smooth`` in its ``extras/ploting.py``), which has no correction of the start.
    """
    return 1.8 * (1 / (1 + math.exp(-0.05 * min(count, 10_000))) - 0.5)


def mean_loss(steps: Sequence[Step]) -> float:
    """The mean loss of the target tokens of ``steps``."""
    return sum(step.loss * step.target_tokens for step in steps) / sum(step.target_tokens for step in steps)


def epoch_of(step: Step) -> int:
    """The epoch, from 1, that an update belongs to; ``step.epoch`` is where the update ended."""
    return max(1, math.ceil(step.epoch - 1e-9))


@dataclass(frozen=True)
class Epoch:
    """One epoch so far: the mean training loss of its target tokens, and the last validation loss within it."""

    epoch: int
    steps: int
    train_loss: float
    train_perplexity: float
    validation_loss: float | None
    validation_perplexity: float | None
    target_tokens: int
    elapsed_s: float
    complete: bool


def epoch_means(steps: Sequence[Step], validation: dict[int, float]) -> list[Epoch]:
    """Means by epoch; ``validation`` holds the validation loss by step."""
    epochs = []
    for number, group in itertools.groupby(steps, epoch_of):
        members = list(group)
        train_loss = mean_loss(members)
        held_out = next((validation[step.step] for step in reversed(members) if step.step in validation), None)
        epochs.append(
            Epoch(
                number,
                len(members),
                train_loss,
                perplexity(train_loss),
                held_out,
                None if held_out is None else perplexity(held_out),
                sum(step.target_tokens for step in members),
                members[-1].elapsed_s,
                # The epoch's last window may have been skipped; steps of a later epoch show that this one is complete.
                members[-1] is not steps[-1] or members[-1].epoch >= number - 1e-9,
            )
        )
    return epochs
