"""A window on a GPU against fp32 on the CPU: loss, gradients and update, for each dtype, precision and kind of row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_tools import CPU, ROUNDOFF, Result, learner_of, passes_of, spec_on, tolerance, window_of, window_on

from llamatune.model.kernels.choice import kernel_fault

pytestmark = pytest.mark.gpu

ROWS: dict[str, dict[str, Any]] = {
    "one": {"training__micro_batch_size": 1, "training__gradient_accumulation_steps": 3},
    "ragged": {"training__micro_batch_size": 3, "training__gradient_accumulation_steps": 2},
    "packed": {"data__packing": True, "data__packed_tokens": 90, "training__micro_batch_size": 1,
               "training__gradient_accumulation_steps": 2},
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16", "nf4")
LEVELS = ("block", "every_2", "attention", "feed_forward", "sublayer", "projections")

_wanted: dict[tuple[str, str], Result] = {}


@pytest.fixture
def wanted(tiny_base: Callable[..., Path], prepared: Callable[..., Path]) -> Callable[..., Result]:
    """The window in fp32 on the CPU with weights of a dtype, each made once."""

    def make(dtype: str, rows: str) -> Result:
        if (dtype, rows) not in _wanted:
            changes = {"model__dtype": dtype, "training__kernels": "plain", **ROWS[rows]}
            _wanted[dtype, rows] = window_on(CPU, tiny_base(torch.bfloat16), prepared(), **changes)
        return _wanted[dtype, rows]

    return make


@pytest.fixture
def found(device: torch.device, tiny_base: Callable[..., Path], prepared: Callable[..., Path]) -> Callable[..., Result]:
    """The window on the device."""
    return lambda rows, **changes: window_on(
        device, tiny_base(torch.bfloat16), prepared(), **{"training__kernels": "plain", **ROWS[rows], **changes}
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("precision", ROUNDOFF)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_is_that_of_fp32_on_the_cpu(
    found: Callable[..., Result], wanted: Callable[..., Result], dtype: str, precision: str, rows: str
) -> None:
    changes = {"model__dtype": dtype, "training__precision": precision}
    found(rows, **changes).assert_close(wanted(dtype, rows), precision)


@pytest.mark.parametrize("changes", [{"training__fused": False}, {"lora": None}], ids=["plain blocks", "every weight"])
def test_blocks_of_modules_too(
    found: Callable[..., Result], tiny_base: Callable[..., Path], prepared: Callable[..., Path], changes: dict[str, Any]
) -> None:
    changes = {**ROWS["ragged"], **changes}
    wanted = window_on(CPU, tiny_base(torch.bfloat16), prepared(), **changes)
    for precision in ("fp32", "bf16"):
        found("ragged", training__precision=precision, **changes).assert_close(wanted, precision)


def test_the_tolerance_sees_attention_across_samples(
    device: torch.device, wanted: Callable[..., Result], tiny_base: Callable[..., Path], prepared: Callable[..., Path]
) -> None:
    changes = {"training__precision": "bf16", "model__dtype": "bfloat16", **ROWS["ragged"]}
    spec = spec_on(device, tiny_base(torch.bfloat16), prepared(), **changes)
    joined = [replace(batch, lengths=(batch.tokens,)) for batch in passes_of(spec, prepared())]
    errors = window_of(spec, learner_of(spec, device), joined, device).errors(wanted("bfloat16", "ragged"))
    assert max(errors.values()) > tolerance("bf16")


KERNELS = [
    *(("Triton", dtype, precision) for dtype in ("bfloat16", "nf4") for precision in ("fp32", "bf16")),
    *(("compiled", dtype, "bf16") for dtype in ("bfloat16", "nf4")),  # some seconds of compilation each
    ("Triton and compiled", "bfloat16", "bf16"),
]


@pytest.mark.parametrize(("kind", "dtype", "precision"), KERNELS)
def test_kernels_and_compiled_functions_are_as_close(
    device: torch.device, found: Callable[..., Result], wanted: Callable[..., Result], kind: str, dtype: str,
    precision: str,
) -> None:  # fmt: skip
    if device.type == "cuda" and "Triton" in kind:
        assert kernel_fault(device) is None
    changes = {"training__kernels": "auto" if "Triton" in kind else "plain", "training__compile": "compiled" in kind}
    result = found("ragged", model__dtype=dtype, training__precision=precision, **changes)
    result.assert_close(wanted(dtype, "ragged"), precision)


@pytest.mark.parametrize("dtype", ["bfloat16", "nf4"])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_levels_give_equal_bits(found: Callable[..., Result], dtype: str, kernels: str) -> None:
    """With dropout, in bf16; a second run of ``none`` is the first of these."""
    lora = {"r": 4, "alpha": 8, "dropout": 0.2, "target_modules": "all-linear"}
    changes: dict[str, Any] = {"lora": lora, "training__precision": "bf16", "training__deterministic": True,
                               "model__dtype": dtype, "training__kernels": kernels}  # fmt: skip
    first = found("ragged", **changes)
    for level in ("none", *LEVELS):
        found("ragged", **changes, training__activation_checkpointing=level).assert_equal(first)
