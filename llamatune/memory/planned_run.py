"""The plan of a run that is not at hand, from the lengths of its rows: passes joined, placement chosen."""

from __future__ import annotations

from collections.abc import Sequence

from llamatune.memory.plan import MemoryPlan, choose_placement, heaviest_rows, joined_tokens, plan_memory
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
    device, tokens = "cuda" if gpu else "cpu", spec.training.tokens_per_pass

    def placed_for(tokens: int | None) -> RunSpec:
        rows = heaviest_rows(lengths, target_counts, spec, tokens, ranks)
        return choose_placement(spec, lambda it: plan_memory(it, config, rows, gpu, limit_bytes).fits, device, ranks)

    if tokens == "auto":
        tokens = joined_tokens(lengths, target_counts, placed_for(None), config, gpu, limit_bytes, ranks)
    rows, spec = heaviest_rows(lengths, target_counts, spec, tokens, ranks), placed_for(tokens)
    return spec, plan_memory(spec, config, rows, gpu, limit_bytes)
