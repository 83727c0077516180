"""What each technique changed: cells that differ in it alone, compared. Loads no torch."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llamatune.benchmarking.grid import Axis, in_words, short_name

PEAK, STEP_TIME, SPEED, HELD_OUT = "peak memory", "step time", "tokens/s", "held-out loss"
_TOLERANCE = {PEAK: 0.5, STEP_TIME: 2.0, SPEED: 2.0}
"""Per cent; what is closer to nothing has no sign."""
_WORTH_TELLING = 1.0
_CASTING = ("training.precision", "training.fused")
"""The techniques that decide what autocast copies."""
_MOST_TOLD = 2

Result = Mapping[str, Any]
"""A cell: ``values`` by axis key, ``status``, and what was measured."""


@dataclass(frozen=True)
class Pair:
    """Two measured cells that differ in one axis, by the values of the others, and what that changed.

    ``changes``: peak memory, step time and tokens/s in per cent; each memory category in per cent of the peak without
    the technique, so that together they are the peak's change; held-out loss in nats, the mean of the seeds.
    """

    others: Mapping[str, str]
    changes: Mapping[str, float]


@dataclass(frozen=True)
class Change:
    """One quantity over all pairs; ``changes_sign``: some clearly rose and some clearly fell."""

    median: float
    lowest: float
    highest: float
    changes_sign: bool


@dataclass(frozen=True)
class Effect:
    """One technique: value ``on`` of ``key`` against value ``off``, whatever the others are.

    ``seed_spread``, where there are several seeds: the held-out loss changes by so much more or less with another one
    (sample standard deviation over the seeds, the middle one of the pairs').
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
    """Every technique of the grid that at least one pair of measured cells tells something about."""
    measured = {tuple(result["values"].items()): result for result in results if result["status"] == "measured"}
    found = []
    for axis in axes:
        for off, on in axis.comparisons():
            pairs, spreads = [], []
            for values, without in measured.items():
                others = dict(values)
                if others[axis.key] != off:
                    continue
                within = measured.get(tuple({**others, axis.key: on}.items()))
                if within is not None:
                    del others[axis.key]
                    pairs.append(Pair(others, _changes(without, within)))
                    spreads.append(sample_deviation(_held_out_changes(without, within)))
            if pairs:
                found.append(_effect(axis.key, off, on, pairs, spreads))
    return found


def sample_deviation(values: Sequence[float]) -> float | None:
    """Of several values; of one there is none."""
    return statistics.stdev(values) if len(values) > 1 else None


def _held_out_changes(without: Result, within: Result) -> list[float]:
    """By seed: rows come in the same order with and without the technique. Empty where one has no held-out rows."""
    return [b - a for a, b in zip(without["held_out_losses"], within["held_out_losses"], strict=False)]


def _changes(without: Result, within: Result) -> dict[str, float]:
    peak = without["allocated_bytes"]
    changes = {PEAK: 100 * (within["allocated_bytes"] - peak) / peak}
    for category, size in without["categories"].items():
        changes[category] = 100 * (within["categories"][category] - size) / peak
    changes[STEP_TIME] = 100 * (within["step_s"] / without["step_s"] - 1)
    changes[SPEED] = 100 * (within["tokens_per_second"] / without["tokens_per_second"] - 1)
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
    """-1, 0 or 1; categories and the loss have no tolerance and no sign."""
    if abs(change) <= _TOLERANCE.get(quantity, float("inf")):
        return 0
    return 1 if change > 0 else -1


def _sign_sentence(quantity: str, pairs: list[Pair]) -> str:
    """Where the quantity rose and where it fell, and what its parts did."""
    rose = [pair for pair in pairs if _sign(quantity, pair.changes[quantity]) > 0]
    fell = [pair for pair in pairs if _sign(quantity, pair.changes[quantity]) < 0]
    keys = _deciding_axes(quantity, pairs)
    parts = []
    for verb, group in (("rose", rose), ("fell", fell)):
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
            if all(len(found - {0}) <= 1 for found in signs.values()):
                return keys
    return ()


def _where(group: list[Pair], keys: tuple[str, ...]) -> str:
    found = list(dict.fromkeys(in_words({key: pair.others[key] for key in keys}) for pair in group))
    return f"with {' or '.join(found)}" if len(found) <= _MOST_TOLD else "elsewhere"


def _breakdown(group: list[Pair]) -> str:
    """The categories' median changes, the largest first, in per cent of the peak without the technique."""
    quantities = [name for name in group[0].changes if name not in (PEAK, STEP_TIME, SPEED, HELD_OUT)]
    medians = {name: statistics.median(pair.changes[name] for pair in group) for name in quantities}
    told = sorted((name for name in medians if abs(medians[name]) >= _WORTH_TELLING), key=lambda n: -abs(medians[n]))
    return ", ".join(f"{name.replace('_', ' ')} {medians[name]:+.1f}" for name in told) or "no category by 1 % of it"


def _casts_sentence(pairs: list[Pair]) -> str | None:
    """What copies of weights in another dtype cost, at the pair where they cost the most."""
    most = max(pairs, key=lambda pair: pair.changes["casts"])
    if most.changes["casts"] < _WORTH_TELLING:
        return None
    where = in_words(most.others)
    return (
        "copies of weights in the dtype of the products, which autocast and autograd keep, add up to "
        f"{most.changes['casts']:.1f} % of the peak{f' ({where})' if where else ''}, "
        f"while activations change by {most.changes['activations']:+.1f}"
    )
