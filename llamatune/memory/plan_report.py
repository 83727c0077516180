"""The report of a memory plan: peak, largest micro-batch and row that fit, remedies, and the moments of the step."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from llamatune.memory.plan import MemoryPlan, largest, plan_memory
from llamatune.memory.remedies import remedies
from llamatune.memory.sizes import Sizes
from llamatune.memory.step import Step
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.spec import RunSpec

_MOST_ROWS = 1 << 16
_ASSUMED_FLOPS, _ASSUMED_BYTES_PER_S = 400e12, 25e9
"""Of a GPU in 16 bits, and of the way to it."""


def plan_report(spec: RunSpec, config: LlamaConfig, plan: MemoryPlan, cuda: Gpu) -> dict[str, Any]:
    """The plan as JSON, under a limit with the largest micro-batch and row that fit, and remedies if it does not.

    ``largest_micro_batch_size`` are rows like the longest, or packed ones. ``largest_row_tokens`` is the length to
    which every row could grow: a sample up to what the model knows, a packed row beyond it.
    """
    facts = {
        **plan.facts(),
        "pass_tokens": plan.rows.tokens,
        "device": "cuda" if cuda else "cpu",
        "placement": spec.model.placement,
        **_streaming(spec, config, plan),
        "fits": None if plan.limit_bytes is None else plan.fits,
    }
    if plan.limit_bytes is None:
        return facts
    size, packing = spec.training.micro_batch_size, spec.data.packing
    share = plan.rows.targets / plan.rows.tokens
    row = plan.rows.lengths[: max(1, len(plan.rows.lengths) // size)] if packing else (max(plan.rows.lengths),)

    def fits(lengths: tuple[int, ...]) -> bool:
        rows = dataclasses.replace(plan.rows, lengths=lengths, targets=max(1, round(sum(lengths) * share)))
        return plan_memory(spec, config, rows, cuda, plan.limit_bytes).fits

    def longer(tokens: int) -> tuple[int, ...]:
        if not packing:
            return (tokens,) * size
        sample = max(1, plan.rows.tokens // len(plan.rows.lengths))
        return ((sample,) * (tokens // sample) + ((tokens % sample,) if tokens % sample else ())) * size

    return facts | {
        "largest_micro_batch_size": largest(lambda count: fits(row * count), _MOST_ROWS),
        "largest_row_tokens": largest(
            lambda tokens: fits(longer(tokens)), 1 << 20 if packing else config.max_position_embeddings
        ),
        "remedies": [] if plan.fits else [dataclasses.asdict(remedy) for remedy in remedies(spec, config, plan, cuda)],
    }


def _streaming(spec: RunSpec, config: LlamaConfig, plan: MemoryPlan) -> dict[str, Any]:
    """What a pass brings to the device, and from how many tokens on its computation may take as long (assumed rates).

    Forward and backward multiply each weight once or more, two operations a token; the first and last two blocks stay.
    """
    placement, ranks = spec.model.placement, plan.rows.ranks
    if placement not in ("host", "shard"):
        return {}
    sizes = Sizes(spec, config, plan.rows, True)
    brought = sizes.block * (ranks - 1) // ranks if placement == "shard" else sizes.block
    return {
        "bytes_brought_per_pass": 2 * max(0, config.num_hidden_layers - 2) * brought,
        "tokens_that_hide_it": math.ceil(
            brought / _ASSUMED_BYTES_PER_S * _ASSUMED_FLOPS / (2 * sizes.block_parameters)
        ),
    }


def explain(spec: RunSpec, config: LlamaConfig, plan: MemoryPlan, cuda: Gpu) -> list[dict[str, Any]]:
    """The moments of the planned step as JSON; ``alive`` lists the tensors of the one that makes the peak."""
    moments = Step(spec, config, plan.rows, cuda).moments(plan.levels)
    peak = max(moments, key=lambda moment: moment.memory.peak)
    return [moment.facts() | ({"alive": moment.alive} if moment is peak else {}) for moment in moments]
