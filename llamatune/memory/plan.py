"""The memory plan of a run: its predicted peak, the blocks that recompute under a limit, the largest rows that fit."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llamatune.memory.sizes import Rows
from llamatune.memory.step import Step, StepBytes
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shapes.recompute_levels import Levels, Recompute, levels_of
from llamatune.spec import RunSpec
from llamatune.units import gibibytes, parse_size

MOST_TOKENS = {"cpu": 2048, "cuda": 8192}
"""More tokens in a pass gain next to nothing: its products are large enough."""


@dataclass(frozen=True)
class MemoryPlan:
    """The step of the heaviest pass; ``levels``: what each fused block recomputes, None for plain blocks."""

    rows: Rows
    levels: Levels | None
    step: StepBytes
    limit_bytes: int | None

    @property
    def fits(self) -> bool:
        """Whether the peak is within the limit, if there is one."""
        return self.limit_bytes is None or self.step.peak <= self.limit_bytes

    def recomputing(self) -> str:
        """``nothing in 20 layers, gate and up in 12 layers``."""
        counts = [(level, (self.levels or ()).count(level)) for level in Recompute]
        return ", ".join(f"{level.label} in {count} layer" + "s" * (count > 1) for level, count in counts if count)

    def room(self) -> str:
        """``about 23.1 GiB of 24.0 GiB``."""
        peak = f"about {gibibytes(self.step.peak)}"
        return peak if self.limit_bytes is None else f"{peak} of {gibibytes(self.limit_bytes)}"

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "predicted_peak_memory_bytes": self.step.peak,
            "predicted_memory_bytes": dataclasses.asdict(self.step),
            "recomputed_layers": None if self.levels is None else {
                level.label: self.levels.count(level) for level in Recompute},
            "memory_limit_bytes": self.limit_bytes,
        }  # fmt: skip


def plan_memory(spec: RunSpec, config: LlamaConfig, rows: Rows, cuda: Gpu, limit_bytes: int | None) -> MemoryPlan:
    """Predict the peak of a step of ``rows``.

    Under ``activation_checkpointing: none`` fused blocks recompute only what the limit requires. Any other value is
    used as it is.
    """
    step, layers = Step(spec, config, rows, cuda), config.num_hidden_layers
    if not step.z.fused:
        return MemoryPlan(rows, None, step.highest(), limit_bytes)
    levels = levels_of(step.mode, layers)
    if step.mode == "none" and limit_bytes is not None:
        levels = cheapest_levels(layers, lambda levels: step.highest(levels).peak, limit_bytes)
    return MemoryPlan(rows, levels, step.highest(levels), limit_bytes)


def choose_placement(spec: RunSpec, fits: Callable[[RunSpec], bool], device: str, ranks: int) -> RunSpec:
    """The spec with ``model.placement: auto`` decided: the device if a step ``fits``, else host or shard.

    One process on a CPU has no other memory, and what trains every parameter is not streamed.
    """
    if spec.model.placement != "auto":
        return spec
    on_device, other = placed(spec, "device"), "shard" if ranks > 1 else "host"
    if spec.adapter is None or (ranks == 1 and device == "cpu") or fits(on_device):
        return on_device
    return placed(spec, other)


def placed(spec: RunSpec, placement: str) -> RunSpec:
    """The spec with another ``model.placement``."""
    return spec.model_copy(update={"model": spec.model.model_copy(update={"placement": placement})})


def with_kernels(spec: RunSpec, kernels: str) -> RunSpec:
    """The spec with another ``training.kernels``."""
    return spec.model_copy(update={"training": spec.training.model_copy(update={"kernels": kernels})})


def limit_of(spec: RunSpec, free_bytes: int | None) -> int | None:
    """What ``training.memory_limit`` allows: an amount, or nine tenths of what is free, if that is known.

    The last tenth is for the allocator's fragments and for what kernels hold inside.
    """
    given = spec.training.memory_limit
    if given != "auto":
        return parse_size(given, "training.memory_limit")
    return None if free_bytes is None else free_bytes * 9 // 10


def heaviest_rows(
    lengths: Sequence[int],
    target_counts: Sequence[int],
    spec: RunSpec,
    pass_tokens: int | None = None,
    ranks: int = 1,
) -> Rows:
    """The pass that needs most memory: the longest rows, or full rows of packed samples.

    It is one micro-batch, or several that have at most ``pass_tokens`` tokens together.
    """
    size, steps, data = spec.training.micro_batch_size, spec.training.gradient_accumulation_steps, spec.data
    if not data.packing:
        longest = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        chosen, room = longest[:size], (pass_tokens or 0) - sum(lengths[i] for i in longest[:size])
        for i in longest[size:] if room > 0 else ():
            if lengths[i] <= room and len(chosen) < size * steps:
                chosen.append(i)
                room -= lengths[i]
        window = sum(lengths[i] for i in longest[: size * steps])
        passes = steps if pass_tokens is None else min(steps, -(-window // pass_tokens))
        return Rows(tuple(lengths[i] for i in chosen), sum(target_counts[i] for i in chosen), passes, ranks)
    total, ordered = sum(lengths), sorted(lengths)
    tokens = min(total, size * max(data.packed_tokens, ordered[-1]))
    joined = max(1, min(steps, (pass_tokens or 0) // tokens))
    tokens = min(total, joined * tokens)
    count = max(1, tokens * len(lengths) // total)
    samples = [ordered[(2 * place + 1) * len(ordered) // (2 * count)] for place in range(count)]
    samples[-1] = max(1, samples[-1] + tokens - sum(samples))
    return Rows(tuple(samples), round(tokens * sum(target_counts) / total), -(-steps // joined), ranks)


def joined_tokens(
    lengths: Sequence[int],
    target_counts: Sequence[int],
    spec: RunSpec,
    config: LlamaConfig,
    cuda: Gpu,
    limit_bytes: int | None,
    ranks: int = 1,
) -> int:
    """Tokens of the passes that ``training.tokens_per_pass: auto`` makes: what fits without more recomputation.

    The heaviest micro-batch has to be computed anyway, so others are joined up to its tokens. More need a limit that is
    known.
    """

    def planned(tokens: int | None) -> MemoryPlan:
        rows = heaviest_rows(lengths, target_counts, spec, tokens, ranks)
        return plan_memory(spec, config, rows, cuda, limit_bytes)

    single = planned(None)
    tokens = 0 if limit_bytes is None else MOST_TOKENS["cuda" if cuda else "cpu"]
    while tokens > single.rows.tokens:
        joined = planned(tokens)
        if joined.fits and joined.levels == single.levels:
            return tokens
        tokens //= 2
    return single.rows.tokens


def cheapest_levels(layers: int, peak: Callable[[Levels], int], limit: int) -> Levels:
    """As many layers as fit recompute nothing, of the rest as many as fit gate and up, and so on.

    That is the least computation: recomputing a whole block costs least for each byte that it saves, so few layers
    that recompute everything are better than many that recompute a part. The last layers recompute least: their
    backward pass runs while everything else is still kept.
    """

    def fits(levels: Levels) -> bool:
        return peak(levels) <= limit

    above: Levels = ()
    *lighter, heaviest = Recompute
    for level in lighter:
        rest = layers - len(above)
        with_more = [(heaviest,) * (rest - count) + (level,) * count + above for count in range(rest + 1)]
        most = bisect.bisect_left(with_more, True, key=lambda levels: not fits(levels)) - 1
        if most < 0:
            break  # recomputing everything does not fit: a short row on few layers, or nothing fits
        above = with_more[most][rest - most :]
    chosen = (heaviest,) * (layers - len(above)) + above
    if above or fits(chosen):
        return chosen
    evenly = [(level,) * layers for level in Recompute]
    return next(filter(fits, evenly), min(evenly, key=peak))


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to ``most`` that fits, 0 if none does; what fits is taken to fit below, too."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
