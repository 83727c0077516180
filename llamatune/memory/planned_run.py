"""Memory plan of a run from the lengths of its rows alone: tokens of a pass, placement of the base, peak."""

from __future__ import annotations

from collections.abc import Sequence

from llamatune.memory.plan import MemoryPlan, choose_placement, heaviest_rows, joined_tokens, plan_memory
from llamatune.memory.sizes import Rows
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.spec import RunSpec


def plan_of_run(
    spec: RunSpec,
    config: LlamaConfig,
    lengths: Sequence[int],
    target_counts: Sequence[int],
    gpu: Gpu,
    limit_bytes: int | None,
    ranks: int = 1,
) -> tuple[RunSpec, MemoryPlan]:
    """The spec with ``model.placement`` decided, and the plan of its heaviest pass, as a run would choose them."""
    tokens = pass_tokens_of_run(spec, config, lengths, target_counts, gpu, limit_bytes, ranks)
    rows = heaviest_rows(lengths, target_counts, spec, tokens, ranks)
    spec = _placed_for(rows, spec, config, gpu, limit_bytes)
    return spec, plan_memory(spec, config, rows, gpu, limit_bytes)


def pass_tokens_of_run(
    spec: RunSpec,
    config: LlamaConfig,
    lengths: Sequence[int],
    target_counts: Sequence[int],
    gpu: Gpu,
    limit_bytes: int | None,
    ranks: int,
) -> int | None:
    """The most tokens of a pass of a run that begins now, as ``training.tokens_per_pass`` says."""
    if spec.training.tokens_per_pass != "auto":
        return spec.training.tokens_per_pass
    single = _placed_for(heaviest_rows(lengths, target_counts, spec, None, ranks), spec, config, gpu, limit_bytes)
    return joined_tokens(lengths, target_counts, single, config, gpu, limit_bytes, ranks)


def _placed_for(rows: Rows, spec: RunSpec, config: LlamaConfig, gpu: Gpu, limit_bytes: int | None) -> RunSpec:
    """The spec with ``model.placement`` decided for passes of these rows."""
    device = "cuda" if gpu else "cpu"
    return choose_placement(spec, lambda it: plan_memory(it, config, rows, gpu, limit_bytes).fits, device, rows.ranks)
