"""The memory plan of a run: its predicted peak, and the recompute level of each block under a memory limit."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamatune.memory.activation_checkpointing import cheapest_levels
from llamatune.memory.sizes import Rows
from llamatune.memory.step import Step, StepBytes
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.config import LlamaConfig
from llamatune.shapes.recompute_levels import Levels, Recompute, levels_of
from llamatune.spec import RunSpec
from llamatune.units import gibibytes, parse_size


@dataclass(frozen=True)
class MemoryPlan:
    """The step of the heaviest micro-batch; ``levels``: what each lean block recomputes, None for plain blocks."""

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

    Under ``activation_checkpointing: none`` lean blocks recompute only what the limit requires. Any other value is
    used as it is.
    """
    step, layers = Step(spec, config, rows, cuda), config.num_hidden_layers
    if not step.z.lean:
        return MemoryPlan(rows, None, step.highest(), limit_bytes)
    levels = levels_of(step.mode, layers)
    if step.mode == "none" and limit_bytes is not None:
        levels = cheapest_levels(layers, lambda levels: step.highest(levels).peak, limit_bytes)
    return MemoryPlan(rows, levels, step.highest(levels), limit_bytes)


def limit_of(spec: RunSpec, free_bytes: int | None) -> int | None:
    """What ``training.memory_limit`` allows: an amount, or nine tenths of what is free, if that is known.

    The last tenth is for the allocator's fragments and for what kernels hold inside.
    """
    given = spec.training.memory_limit
    if given != "auto":
        return parse_size(given, "training.memory_limit")
    return None if free_bytes is None else free_bytes * 9 // 10


def heaviest_rows(lengths: Sequence[int], target_counts: Sequence[int], spec: RunSpec) -> Rows:
    """The micro-batch that needs most memory: the longest rows, or full rows of packed samples."""
    size, data = spec.training.micro_batch_size, spec.data
    if not data.packing:
        longest = heapq.nlargest(size, range(len(lengths)), key=lengths.__getitem__)
        return Rows(tuple(lengths[i] for i in longest), sum(target_counts[i] for i in longest))
    total, ordered = sum(lengths), sorted(lengths)
    tokens = min(total, size * max(data.packed_tokens, ordered[-1]))
    count = max(1, tokens * len(lengths) // total)
    samples = [ordered[(2 * place + 1) * len(ordered) // (2 * count)] for place in range(count)]
    samples[-1] = max(1, samples[-1] + tokens - sum(samples))
    return Rows(tuple(samples), round(tokens * sum(target_counts) / total))
