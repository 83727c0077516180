"""Activation checkpointing (Chen et al. 2016), how much of it a run needs, and the memory that was really used."""

from __future__ import annotations

import resource
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llamatune.data.dataset import Split
from llamatune.devices import capability_of, free_memory_bytes
from llamatune.events import Notice, OnEvent
from llamatune.memory.plan import MemoryPlan, heaviest_rows, limit_of, plan_memory
from llamatune.memory.remedies import remedies
from llamatune.memory.step import Levels, is_whole, levels_of
from llamatune.model.config import LlamaConfig
from llamatune.model.recompute import Recompute, apply_fused
from llamatune.model.transformer import Block, Transformer
from llamatune.spec import RunSpec


def recompute(function: Any, *args: Any) -> Tensor:
    """Run a part of a block keeping its inputs only; backward runs it again, with the same dropout.

    Non-reentrant: the reentrant kind gives no gradient, or a part of it, when the block's input needs none.
    """
    return checkpoint(function, *args, use_reentrant=False)  # type: ignore[no-any-return]


def apply_activation_checkpointing(model: Transformer, mode: str, fused: bool, levels: Levels | None = None) -> None:
    """Choose what is recomputed: ``none``, ``block``, ``every_N`` (each N-th block), ``attention``, ``feed_forward``,
    ``sublayer`` (attention and feed-forward each on its own, norm included) or ``projections``; ``fused``: by the
    functions of a LoRA block that recompute no more than their gradients need, and by ``levels`` if they are given."""
    levels = levels_of(mode, len(model.model.layers)) if levels is None else levels
    for index, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        if fused:
            apply_fused(block, Recompute(levels[index]))
        elif is_whole(mode, index):
            block.run_block = recompute
        elif mode in ("feed_forward", "sublayer"):
            block.run_feed_forward = recompute
        if mode in ("attention", "sublayer"):
            block.run_attention = recompute


def plan_run_memory(spec: RunSpec, config: LlamaConfig, train: Split, device: torch.device) -> MemoryPlan:
    """The plan of a run on its data, within ``training.memory_limit``."""
    limit = limit_of(spec, free_memory_bytes(device))
    rows = heaviest_rows(train.lengths, train.target_counts, spec)
    return plan_memory(spec, config, rows, capability_of(device), limit)


def report_plan(plan: MemoryPlan, spec: RunSpec, config: LlamaConfig, device: torch.device, on_event: OnEvent) -> None:
    """Say what is recomputed that was not asked for, and warn of what will not fit."""
    if not plan.fits:
        found = remedies(spec, config, plan, capability_of(device))
        helpful = next((remedy for remedy in found if remedy.fits), found[0] if found else None)
        advice = f"; {helpful.advice()}" if helpful else ""
        on_event(Notice(f"a step needs {plan.room()} that may be used{advice}", "warning"))
    elif plan.levels and any(plan.levels) and spec.training.activation_checkpointing == "none":
        on_event(Notice(f"recomputing: {plan.recomputing()}; {plan.room()}"))


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA's largest allocation on ``device``; on the CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_reserved_bytes(device: torch.device) -> int | None:
    """What CUDA's allocator held at most, freed blocks included; None on the CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
