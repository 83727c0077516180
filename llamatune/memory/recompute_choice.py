"""Choice of recompute levels: how many blocks recompute how much, so that a step fits into a memory limit."""

from __future__ import annotations

import bisect
import math

from llamatune.memory.step import Step
from llamatune.shapes.config import LINEAR_MODULES, LlamaConfig
from llamatune.shapes.levels import Levels, Recompute


def cheapest_levels(step: Step, layers: int, limit: int) -> Levels:
    """As many layers as fit recompute nothing, of the rest as many as fit gate and up, and so on.

    That is the least computation: recomputing a whole block costs least for each byte that it saves, so few layers
    that recompute everything are better than many that recompute a part. The last layers recompute least: their
    backward pass runs while everything else is still kept.
    """

    def fits(levels: Levels) -> bool:
        return step.highest(levels).peak <= limit

    above: Levels = ()
    *lighter, heaviest = Recompute
    for level in lighter:
        rest = layers - len(above)

        def with_more(count: int, above: Levels = above, level: Recompute = level, rest: int = rest) -> Levels:
            return (heaviest,) * (rest - count) + (level,) * count + above

        most = bisect.bisect_left(range(rest + 1), True, key=lambda count: not fits(with_more(count))) - 1
        if most < 0:
            break  # recomputing everything does not fit: a short row on few layers, or nothing fits
        above = with_more(most)[rest - most :]
    chosen = (heaviest,) * (layers - len(above)) + above
    if above or fits(chosen):
        return chosen
    evenly = [(level,) * layers for level in Recompute]
    return next(filter(fits, evenly), min(evenly, key=lambda levels: step.highest(levels).peak))


def recomputed_share(config: LlamaConfig, levels: Levels) -> float:
    """What the levels add to the products of a LoRA step: forward once, and once more to the gradient of the input."""
    counts = {name: math.prod(config.linear_shape(name)) for name in LINEAR_MODULES}
    again = sum(counts[name] for level in levels for name in level.modules)
    return again / (2 * sum(counts.values()) * len(levels))
