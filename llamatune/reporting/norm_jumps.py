"""Gradient norms that jump from update to update far more than the losses do, as they do where the rate is too high."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llamatune.events import Step
from llamatune.reporting.noise import noise_of

# Norms of ordinary runs vary by a deviation of 0.1 to 0.5 of their logarithm, of tiny batches by up to 0.65, and the
# losses of those as much. Above one, and above twice the noise of the losses, gradients of neighbouring updates differ
# by orders of magnitude.
JUMP_DEVIATION, JUMP_OF_LOSSES = 1.0, 2.0
# Of fewer steps the deviation is not known well enough.
JUMP_FEWEST = 12


@dataclass(frozen=True)
class NormJumps:
    """``factor`` is how many times larger or smaller a norm is than the one before, as a typical jump (one deviation).

    ``lowest`` and ``highest`` norms are of all steps, before clipping.
    """

    factor: float
    lowest: float
    highest: float


def judge_norms(steps: Sequence[Step]) -> NormJumps | None:
    """The jumps of the gradient's norm; None where they are ordinary, and with too few steps."""
    if len(steps) < JUMP_FEWEST:
        return None
    norms = [step.grad_norm for step in steps]
    deviation = noise_of(norms)
    if deviation <= max(JUMP_DEVIATION, JUMP_OF_LOSSES * noise_of([step.loss for step in steps])):
        return None
    # A jump is between two norms, each with its own deviation.
    return NormJumps(math.exp(deviation * math.sqrt(2)), min(norms), max(norms))
