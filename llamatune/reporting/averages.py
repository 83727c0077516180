"""What is drawn and compared instead of raw values: running averages, epoch means, and fewer points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llamatune.reporting.run_reader import Step
from llamatune.units import perplexity


def running_average(values: Sequence[float], decay: float) -> list[float]:
    """Exponential moving average with the start's bias taken out (Kingma and Ba 2015, algorithm 1).

    m_t = decay · m_(t-1) + (1 - decay) · x_t from m_0 = 0, shown as m_t / (1 - decay^t): the first is x_1 itself.
    """
    average, weight, averages = 0.0, 0.0, []
    for value in values:
        average = decay * average + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        averages.append(average / weight)
    return averages


def mean_loss(steps: Sequence[Step]) -> float:
    """The mean over the target tokens of ``steps``."""
    return sum(step.loss * step.target_tokens for step in steps) / sum(step.target_tokens for step in steps)


def epoch_of(step: Step) -> int:
    """The epoch, from 1, that an update belongs to; ``step.epoch`` is where the update ended."""
    return max(1, math.ceil(step.epoch - 1e-9))


@dataclass(frozen=True)
class Epoch:
    """One epoch as far as it got: the token-weighted training loss, and the last validation loss within it."""

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
    """Means by epoch; ``validation`` is the loss by step."""
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
                # A skipped window may have been the epoch's last one; a later epoch shows that it was left behind.
                members[-1] is not steps[-1] or members[-1].epoch >= number - 1e-9,
            )
        )
    return epochs


def thinned(values: Sequence[float], limit: int) -> list[int]:
    """At most ``limit`` places to draw: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(values) <= limit:
        return list(range(len(values)))
    stretches = max(1, limit // 2)
    kept = set()
    for number in range(stretches):
        places = range(number * len(values) // stretches, (number + 1) * len(values) // stretches)
        kept |= {min(places, key=values.__getitem__), max(places, key=values.__getitem__)}
    return sorted(kept)
