"""The memory plan against what the allocator of a GPU counts, at one to some GB."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import step_meter
import torch
from gpu_tools import settings_of
from step_tools import spec_of

from llamatune.devices import capability_of
from llamatune.events import ignore_event, never_stop
from llamatune.memory.plan import plan_memory
from llamatune.memory.sizes import Rows
from llamatune.shapes.counts import count_parameters
from llamatune.shapes.llama_config import LINEAR_MODULES, LlamaConfig
from llamatune.training.inputs import Inputs
from llamatune.training.model_and_optimizer import build_learner
from llamatune.training.training_step import make_update

pytestmark = pytest.mark.gpu

CONFIG = LlamaConfig(4096, 11008, 8, 32, 32, 32000)
"""Eight layers of LLaMA-2-7B, 3.7 GB in bf16."""
SMALL = LlamaConfig(96, 256, 4, 6, 6, 512)
ALLOWED = 0.03
"""Of either number: allocated at the peak, and reserved with expandable segments."""


class Case(NamedTuple):
    """Rows of so many tokens, and what differs from LoRA on q and v with nothing recomputed."""

    rows: int
    tokens: int
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    checkpointing: str = "none"
    changes: tuple[tuple[str, Any], ...] = ()


CASES = {
    "1 x 512": Case(1, 512),
    "8 x 512": Case(8, 512),
    "8 x 512, all seven": Case(8, 512, LINEAR_MODULES),
    "8 x 512, dropout": Case(8, 512, LINEAR_MODULES, changes=(("dropout", 0.1),)),
    "8 x 512, projections": Case(8, 512, LINEAR_MODULES, "projections"),
    "8 x 512, block": Case(8, 512, LINEAR_MODULES, "block"),
    "4 x 512, plain blocks": Case(4, 512, changes=(("fused", False),)),
    "4 x 512, NF4": Case(4, 512, LINEAR_MODULES, changes=(("dtype", "nf4"),)),
    "4 x 512, fp32": Case(4, 512, changes=(("dtype", "float32"), ("precision", "fp32"))),
    "4 x 512, adamw_8bit, accumulated": Case(
        4, 512, LINEAR_MODULES, changes=(("optimizer", "adamw_8bit"), ("gradient_accumulation_steps", 4))
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_what_a_step_needs(device: torch.device, tell: Callable[[str], None], name: str) -> None:
    case, cuda = CASES[name], device.type == "cuda"
    config = CONFIG if cuda else SMALL
    spec = spec_of(case.targets, case.checkpointing, **dict(case.changes), device=str(device), kernels="auto")
    tokens = case.tokens if cuda else 64
    batch = step_meter.even_batch(case.rows, tokens, step_meter.TARGET_SHARE)
    passes = [batch] * spec.training.gradient_accumulation_steps
    rows = Rows((tokens,) * case.rows, batch.target_tokens)
    planned = plan_memory(spec, config, rows, capability_of(device), None).step.peak
    count: Any = count_parameters(config, spec.adapter)
    inputs = Inputs(config, None, "", None, None, None, {}, count, device)  # type: ignore[arg-type]
    gc.collect()
    meter = None if cuda else step_meter.StepMeter()
    if cuda:
        torch.cuda.empty_cache()
    others = torch.cuda.memory_allocated(device) if cuda else 0
    others_reserved = torch.cuda.memory_reserved(device) if cuda else 0
    with meter or settings_of(spec, device):
        learner = build_learner(spec, inputs, ignore_event, never_stop, drawn_on=device)
        for window in range(3):
            if window < 2:  # until the optimizer's state is there
                _reset(device, meter)
            make_update(learner, passes, spec.training, window, 1e-4)
    if meter is not None:
        found = {"allocated": meter.peak_bytes}
    else:
        allocated = torch.cuda.max_memory_allocated(device) - others
        found = {"allocated": allocated, "reserved": torch.cuda.max_memory_reserved(device) - others_reserved}
    del learner
    shares = {kind: size / planned for kind, size in found.items()}
    tell(f"{planned / 2**20:.0f} MiB planned; " + ", ".join(f"{kind} {share:.4f}" for kind, share in shares.items()))
    allowed = ALLOWED if cuda else 0.1  # at this size tables and small tensors count
    assert all(abs(share - 1) <= allowed for share in shares.values()), shares


def _reset(device: torch.device, meter: step_meter.StepMeter | None) -> None:
    """Measure anew from here, without what lies in the allocator's cache."""
    gc.collect()
    if meter is not None:
        meter.start_window()
        return
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
