"""The memory plan of ``lora.modules_to_save``: trained copies, their gradients and state, and what they replace."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import step_meter
from step_tools import spec_of, step_bytes
from test_step_bytes import QV, SMALL, TIED, TOLERANCE, measured, predicted
from torch._subclasses.fake_tensor import FakeTensorMode

from llamatune.events import ignore_event, never_stop
from llamatune.memory.plan import plan_memory
from llamatune.memory.remedies import remedies
from llamatune.memory.sizes import Rows
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.training.model_and_optimizer import build_learner

ALL, SLOW = ("embed_tokens", "lm_head", "norm"), pytest.mark.slow
WHOLE: list[Any] = [
    # whole, config, dtype, precision, fused, mode, optimizer, accumulation
    (ALL, SMALL, "bfloat16", "bf16", True, "none", "adamw", 1),
    (ALL[:2], SMALL, "nf4", "bf16", True, "block", "adamw_8bit", 2),
    (ALL[:1], TIED, "float32", "fp32", False, "none", "adamw", 1),
    (ALL[1:], TIED, "bfloat16", "fp32", True, "projections", "adamw", 1),
    (ALL[2:], SMALL, "float32", "bf16", True, "block", "sgd", 1),
    *(pytest.param(*case, marks=SLOW) for case in itertools.product(
        (ALL[:2], ALL[:1], ALL[1:2]), (SMALL, TIED), ("bfloat16",), ("bf16", "fp32"), (True, False), ("none",),
        ("adamw",), (2,))),
]  # fmt: skip


@pytest.mark.parametrize(("whole", "config", "dtype", "precision", "fused", "mode", "optimizer", "windows"), WHOLE)
def test_modules_trained_whole(
    whole: tuple[str, ...], config: LlamaConfig, dtype: str, precision: str, fused: bool, mode: str, optimizer: str,
    windows: int,
) -> None:  # fmt: skip
    training = {"optimizer": optimizer, "gradient_accumulation_steps": windows}
    spec = spec_of(QV, mode, 0.1, dtype=dtype, precision=precision, fused=fused, lora={"modules_to_save": list(whole)},
                   **training)  # fmt: skip
    assert predicted(spec, config, 2, 300) == pytest.approx(measured(spec, config, 2, 300), rel=TOLERANCE)


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["", "tied"])
@pytest.mark.parametrize("whole", [ALL, ALL[:1], ALL[1:]], ids=str)
def test_what_is_trained_whole_replaces_the_base(config: LlamaConfig, whole: tuple[str, ...]) -> None:
    spec = spec_of(QV, lora={"modules_to_save": list(whole)})
    with FakeTensorMode(allow_non_fake_inputs=True):
        learner = build_learner(spec, step_meter._inputs_without_data(spec, config), ignore_event, never_stop)
    found = step_bytes(spec, config, Rows((8,), 4), cuda=False)
    held = {id(x): x for x in learner.model.parameters()}.values()
    assert found.weights == sum(x.numel() * x.element_size() for x in held if not x.requires_grad)
    assert found.adapter == sum(4 * x.numel() for x in learner.parameters.values())


def test_to_train_them_no_more_is_named_among_what_lowers_memory() -> None:
    for whole in (ALL, ()):
        spec, rows = spec_of(QV, lora={"modules_to_save": list(whole)}), Rows((64,), 32)
        changes = [
            remedy.change for remedy in remedies(spec, SMALL, plan_memory(spec, SMALL, rows, False, None), False)
        ]
        assert ("lora.modules_to_save=[]" in changes) is bool(whole)
