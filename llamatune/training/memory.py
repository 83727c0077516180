"""The memory plan of a run on its data, and the peak memory that was used."""

from __future__ import annotations

import resource

import torch

from llamatune.data.batches import Split
from llamatune.devices import capability_of, free_memory_bytes
from llamatune.events import Notice, OnEvent
from llamatune.memory.plan import MemoryPlan, heaviest_rows, limit_of, plan_memory
from llamatune.memory.remedies import remedies
from llamatune.shapes.config import LlamaConfig
from llamatune.spec import RunSpec


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
