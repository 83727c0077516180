"""The memory of a run: its plan on its data, what the learner holds, and the measured peak."""

from __future__ import annotations

import resource
from collections.abc import Iterable

import torch
from torch import Tensor

from llamatune.data.batches import Split
from llamatune.devices import capability_of, free_memory_bytes, memory_size_bytes
from llamatune.events import MemoryHeld, Notice, OnEvent
from llamatune.memory.plan import (
    MemoryPlan,
    choose_placement,
    heaviest_rows,
    limit_of,
    placed,
    plan_memory,
)
from llamatune.memory.planned_run import pass_tokens_of_run
from llamatune.memory.remedies import remedies
from llamatune.ranks import Ranks
from llamatune.shapes.gradient_lanes import count_lanes
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.spec import RunSpec
from llamatune.training.model_and_optimizer import Learner
from llamatune.training.passes import PassRule


def plan_run_memory(
    spec: RunSpec,
    config: LlamaConfig,
    train: Split,
    device: torch.device,
    pass_tokens: int | None = None,
    ranks: int = 1,
) -> MemoryPlan:
    """The plan of a run on its data, in passes of at most ``pass_tokens``, within ``training.memory_limit``."""
    limit = limit_of(spec, free_memory_bytes(device))
    rows = heaviest_rows(train.lengths, train.target_counts, spec, pass_tokens, ranks)
    return plan_memory(spec, config, rows, capability_of(device), limit)


def choose_run_placement(
    spec: RunSpec, config: LlamaConfig, train: Split, device: torch.device, pass_tokens: int | None, ranks: Ranks
) -> RunSpec:
    """The spec with ``model.placement`` decided: the device only where passes of so many tokens fit on every rank."""

    def fits(tried: RunSpec) -> bool:
        return not ranks.any(not plan_run_memory(tried, config, train, device, pass_tokens, ranks.size).fits)

    return choose_placement(spec, fits, device.type, ranks.size)


def choose_passes(spec: RunSpec, config: LlamaConfig, train: Split, device: torch.device, ranks: int) -> PassRule:
    """The passes of a run that begins now, as ``training.tokens_per_pass`` says."""
    lanes = None if spec.adapter is None else count_lanes(ranks)
    limit, gpu = limit_of(spec, free_memory_bytes(device)), capability_of(device)
    tokens = pass_tokens_of_run(spec, config, train.lengths, train.target_counts, gpu, limit, ranks)
    return PassRule(tokens, ranks if spec.training.tokens_per_pass == "auto" else 1, lanes)


def report_plan(
    plan: MemoryPlan,
    spec: RunSpec,
    chosen: RunSpec,
    config: LlamaConfig,
    train: Split,
    device: torch.device,
    on_event: OnEvent,
) -> None:
    """Report where the base lies and why, what is recomputed to fit the limit, and warn if the step does not fit.

    ``chosen`` is the spec with ``model.placement`` decided, which ``plan`` is for.
    """
    where = {"host": "host memory", "shard": "slices on all ranks"}.get(chosen.model.placement)
    if where is not None:
        why, instead = _why_not_on_device(plan, spec, config, train, device) if spec != chosen else ("", "")
        on_event(
            Notice(f"the frozen weights of the blocks lie in {where}{why}; two are on {device} at a time{instead}")
        )
    if not plan.fits:
        offered = remedies(chosen, config, plan, capability_of(device))
        lowest = min(offered, key=lambda remedy: remedy.peak_bytes, default=None)
        best = next((remedy for remedy in offered if remedy.fits), lowest)
        advice = f"; {best.advice()}" if best else ""
        on_event(Notice(f"a step needs {plan.room()} that may be used{advice}", "warning"))
    elif plan.levels and any(plan.levels) and spec.training.activation_checkpointing == "none":
        on_event(Notice(f"recomputing: {plan.recomputing()}; {plan.room()}"))


def _why_not_on_device(
    plan: MemoryPlan, spec: RunSpec, config: LlamaConfig, train: Split, device: torch.device
) -> tuple[str, str]:
    """What a step with all weights on the device would need, and the first change with which that fits.

    In the passes that the spec asks for: ``tokens_per_pass: auto`` joins no rows where these alone do not fit.
    """
    tokens, there = spec.training.tokens_per_pass, placed(spec, "device")
    single = None if tokens == "auto" else tokens
    rows = heaviest_rows(train.lengths, train.target_counts, spec, single, plan.rows.ranks)
    needed = plan_memory(there, config, rows, capability_of(device), plan.limit_bytes)
    if needed.fits:  # on this rank, but not on each
        return "", ""
    offered = remedies(there, config, needed, capability_of(device))
    best = next((it for it in offered if it.fits and not it.change.startswith("model.placement")), None)
    why = f", because a step with all of them on {device} needs {needed.room()} that may be used"
    return why, f"; all fit there with {best.advice()}" if best else ""


def held_memory(learner: Learner) -> MemoryHeld:
    """What the learner keeps between updates; storage that tensors share counts once."""
    trained_bytes = _storage_bytes(learner.parameters.values())
    streamed = [] if learner.streamed is None else learner.streamed.tensors
    frozen = [*learner.model.parameters(), *learner.model.buffers(), *streamed]
    on_device = [tensor for tensor in frozen if tensor.device.type == learner.device.type]
    frozen_bytes = 0 if learner.sharded is not None else _storage_bytes(on_device) - trained_bytes
    optimizer_bytes = _storage_bytes(learner.optimizer.state_tensors().values())
    return MemoryHeld(frozen_bytes, trained_bytes, optimizer_bytes, memory_size_bytes(learner.device))


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA's largest allocation on ``device``; on the CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_reserved_bytes(device: torch.device) -> int | None:
    """The most that CUDA's allocator held, freed blocks included; None on the CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
