"""Single steps whose memory is counted, on a spec without paths."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import step_meter
import torch
from step_meter import StepMeter
from torch import Tensor

from llamatune.data.batches import Batch
from llamatune.events import ignore_event, never_stop
from llamatune.memory.sizes import Rows
from llamatune.memory.step import Step, StepBytes
from llamatune.shapes.attention_kernels import Gpu
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shapes.recompute_levels import Levels
from llamatune.spec import RunSpec
from llamatune.spec_sections import TrainingSection
from llamatune.training.model_and_optimizer import Learner, build_learner
from llamatune.training.training_step import make_update


def spec_of(targets: Sequence[str], checkpointing: str = "none", dropout: float = 0.0, **training: Any) -> RunSpec:
    """LoRA of r=16 on ``targets``, all of the model where there are none; bf16 weights unless ``dtype`` is given.

    ``lora`` changes that section.
    """
    lora = training.pop("lora", {})
    values: dict[str, Any] = {
        "model": {"path": "none", "init": "random", "dtype": training.pop("dtype", "bfloat16")},
        "data": {"train": "none"},
        "training": {
            "output_dir": "none",
            "gradient_accumulation_steps": 1,
            "activation_checkpointing": checkpointing,
            "device": "cpu",
            **training,
        },
    }
    if targets:
        values["lora"] = {"r": 16, "dropout": dropout, "target_modules": list(targets), **lora}
    return RunSpec.model_validate(values)


def step_bytes(spec: RunSpec, config: LlamaConfig, rows: Rows, cuda: Gpu, levels: Levels | None = None) -> StepBytes:
    """The predicted memory of a step whose micro-batches are ``rows``."""
    return Step(spec, config, rows, cuda).highest(levels)


def real_step(spec: RunSpec, config: LlamaConfig, batch: Batch) -> tuple[int, StepMeter]:
    """What lies there between steps, and the meter after a second step on tensors with content."""
    gc.collect()
    micro_batches = [batch] * min(2, spec.training.gradient_accumulation_steps)
    with StepMeter() as meter:
        inputs = step_meter._inputs_without_data(spec, config)
        learner = build_learner(spec, inputs, ignore_event, never_stop)
        step_meter._step(spec, learner, micro_batches, 0)
        resident = meter.live_bytes
        meter.start_window()
        step_meter._step(spec, learner, micro_batches, 1)
    return resident, meter


def saved_by_autograd(learner: Learner, batch: Batch) -> int:
    """Bytes that a forward pass saves as autograd's own hooks tell: each storage once, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in learner.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        make_update(learner, [batch], TrainingSection(output_dir="none"), 0, 1e-3)
    return sum(kept.values())
