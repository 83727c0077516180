"""The effect of each technique on memory, time, speed and loss: compares cells that differ in it alone.

Loads no torch.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llamatune.benchmarking.grid import comparisons
from llamatune.benchmarking.results import CATEGORIES, Result, only_measured, sample_deviation
from llamatune.spec_grid import Axis, in_words, short_name

PEAK, WORK_TIME, SPEED, HELD_OUT = "peak memory", "time for equal work", "tokens/s", "held-out loss"
_TOLERANCE = {PEAK: 0.5, WORK_TIME: 2.0, SPEED: 2.0}
"""Changes up to this many per cent have no sign."""
_LEAST_REPORTED = 1.0
"""Per cent of the peak; smaller changes of a category are left out of sentences."""
_CASTING = ("training.precision", "training.fused")
"""The techniques that decide what autocast copies."""
_MOST_NAMED = 2


@dataclass(frozen=True)
class Pair:
    """Two measured cells that differ in one axis: the values of the other axes, and the changes.

    ``changes``: peak memory, the time for equal work and tokens/s in per cent (a step of accumulated micro-batches does
    more work than one without); each memory category in per cent of the peak without
    the technique, so that they add up to the peak's change; held-out loss in nats, the mean of the seeds.
    """

    others: Mapping[str, str]
    changes: Mapping[str, float]


@dataclass(frozen=True)
class Change:
    """The change of one quantity over all pairs; ``changes_sign``: it clearly rose in some and fell in others."""

    median: float
    lowest: float
    highest: float
    changes_sign: bool


@dataclass(frozen=True)
class Effect:
    """One technique: value ``on`` of axis ``key`` against value ``off``, over all values of the other axes.

    ``seed_spread``: the sample standard deviation of the change of the held-out loss over the seeds, the median of the
    pairs; None with one seed.
    """

    key: str
    off: str
    on: str
    pairs: tuple[Pair, ...]
    changes: Mapping[str, Change]
    seed_spread: float | None
    sentences: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{short_name(self.key)} {self.on} (not {self.off})"


def effects(axes: Sequence[Axis], results: Sequence[Result]) -> list[Effect]:
    """Every technique of the grid for which there is a pair of measured cells."""
    measured = {frozenset(result["values"].items()): result for result in only_measured(results)}
    compared = []
    for axis in axes:
        for off, on in comparisons(axis):
            pairs, spreads = [], []
            for without in measured.values():
                others = {key: value for key, value in without["values"].items() if key != axis.key}
                within = measured.get(frozenset({**others, axis.key: on}.items()))
                if without["values"][axis.key] == off and within is not None:
                    pairs.append(Pair(others, _changes(without, within)))
                    spreads.append(sample_deviation(_held_out_changes(without, within)))
            if pairs:
                compared.append(_effect(axis.key, off, on, pairs, spreads))
    return compared


def _held_out_changes(without: Result, within: Result) -> list[float]:
    """By seed, since both cells saw the rows in the same order. Empty if either has no held-out rows."""
    before, after = without["held_out_losses"], within["held_out_losses"]
    return [b - a for a, b in zip(before, after, strict=True)] if before and after else []


def _changes(without: Result, within: Result) -> dict[str, float]:
    peak = without["allocated_bytes"]
    changes = {PEAK: 100 * (within["allocated_bytes"] - peak) / peak}
    for category in CATEGORIES:
        changes[category] = 100 * (within["categories"][category] - without["categories"][category]) / peak
    faster = within["tokens_per_second"] / without["tokens_per_second"]
    changes |= {WORK_TIME: 100 * (1 / faster - 1), SPEED: 100 * (faster - 1)}
    if losses := _held_out_changes(without, within):
        changes[HELD_OUT] = statistics.fmean(losses)
    return changes


def _effect(key: str, off: str, on: str, pairs: list[Pair], spreads: Sequence[float | None]) -> Effect:
    changes = {}
    for quantity in dict.fromkeys(name for pair in pairs for name in pair.changes):
        values = [pair.changes[quantity] for pair in pairs if quantity in pair.changes]
        signs = {_sign(quantity, value) for value in values}
        changes[quantity] = Change(statistics.median(values), min(values), max(values), {-1, 1} <= signs)
    sentences = [_sign_sentence(quantity, pairs) for quantity in (PEAK, SPEED) if changes[quantity].changes_sign]
    if key in _CASTING and (cast_sentence := _casts_sentence(pairs)) is not None:
        sentences.append(cast_sentence)
    known = [spread for spread in spreads if spread is not None]
    return Effect(key, off, on, tuple(pairs), changes, statistics.median(known) if known else None, tuple(sentences))


def _sign(quantity: str, change: float) -> int:
    """-1, 0 or 1; always 0 for categories and the loss."""
    return 0 if abs(change) <= _TOLERANCE.get(quantity, math.inf) else 1 if change > 0 else -1


def _sign_sentence(quantity: str, pairs: list[Pair]) -> str:
    """In which cells the quantity rose and in which it fell, and by what categories."""
    keys = _deciding_axes(quantity, pairs)
    parts = []
    for verb, sign in (("rose", 1), ("fell", -1)):
        group = [pair for pair in pairs if _sign(quantity, pair.changes[quantity]) == sign]
        middle = statistics.median(pair.changes[quantity] for pair in group)
        where = _where(group, keys) if keys else f"in {len(group)} of {len(pairs)} pairs"
        of_what = f": {_breakdown(group)}" if quantity == PEAK else ""
        parts.append(f"{verb} {where} (median {middle:+.1f} %{of_what})")
    return f"{quantity} changes its sign: it " + " and ".join(parts)


def _deciding_axes(quantity: str, pairs: list[Pair]) -> tuple[str, ...]:
    """The other technique, or for memory (which has no noise) the two, whose values tell whether the quantity rises."""
    for count in (1, 2) if quantity == PEAK else (1,):
        for keys in itertools.combinations(pairs[0].others, count):
            signs: dict[tuple[str, ...], set[int]] = {}
            for pair in pairs:
                values = tuple(pair.others[key] for key in keys)
                signs.setdefault(values, set()).add(_sign(quantity, pair.changes[quantity]))
            if all(len(by_pair - {0}) <= 1 for by_pair in signs.values()):
                return keys
    return ()


def _where(group: list[Pair], keys: tuple[str, ...]) -> str:
    settings = list(dict.fromkeys(in_words({key: pair.others[key] for key in keys}) for pair in group))
    return f"with {' or '.join(settings)}" if len(settings) <= _MOST_NAMED else "elsewhere"


def _breakdown(group: list[Pair]) -> str:
    """The categories' median changes, the largest first, in per cent of the peak without the technique."""
    medians = {name: statistics.median(pair.changes[name] for pair in group) for name in CATEGORIES}
    largest = sorted(medians.items(), key=lambda item: -abs(item[1]))
    reported = [f"{name} {change:+.1f}" for name, change in largest if abs(change) >= _LEAST_REPORTED]
    return ", ".join(reported) or "no category by 1 % of it"


def _casts_sentence(pairs: list[Pair]) -> str | None:
    """The memory of copies of weights in another dtype, in the pair where it is largest."""
    most = max(pairs, key=lambda pair: pair.changes["casts"])
    if most.changes["casts"] < _LEAST_REPORTED:
        return None
    where = f" ({in_words(most.others)})" if most.others else ""
    return (
        "copies of weights in the dtype of the products, which autocast and autograd keep, add up to "
        f"{most.changes['casts']:.1f} % of the peak{where}, "
        f"while activations change by {most.changes['activations']:+.1f}"
    )
