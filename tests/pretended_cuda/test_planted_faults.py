"""The checks on a pretended GPU find what they are for: each fault here is planted, and seen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from planted_faults import FAULTS
from techniques import DIMENSIONS, job_of

if TYPE_CHECKING:
    from conftest import Gpu

PLAIN = {
    **{name: values[0] for name, values in DIMENSIONS.items()},
    "precision": "fp16",
    "dtype": "float16",
    "capability": "9.0",
    "heads": "grouped",
}
END = ["training/training_step.py:make_update", "a copy to the host", 1]
IN_A_PASS = "training/window_gradients.py:window_gradients"

IN_THE_WINDOW = {
    ".item() of each pass": [END, [IN_A_PASS, "a number read", 2]],
    "a comparison of each pass": [END, [IN_A_PASS, "a number read", 2]],
    ".cpu() of each pass": [END, [IN_A_PASS, "a copy to the host", 2]],
    "a blocking copy to the device in each pass": [END, [IN_A_PASS, "a copy to the device", 2]],
    "a finite check of its own": [END, [END[0], "a number read", 1]],
}
ERRORS = {"a mask made on the CPU": "FakeTensorDeviceMismatchError", "nonzero of each pass": "DynamicOutputShape"}
KERNELS = {"cuDNN attention": "cudnn", "grouped heads in math attention": "math"}


def faulty(gpu: Gpu, fault: str, **changes: str) -> dict[str, Any]:
    return gpu.run(**job_of({**PLAIN, **changes}), fault=fault)


@pytest.mark.parametrize("fault", IN_THE_WINDOW)
def test_a_wait_in_the_window_is_counted_with_its_place(gpu: Gpu, fault: str) -> None:
    found = faulty(gpu, fault)
    assert found["error"] is None
    assert found["waits"]["window"] == IN_THE_WINDOW[fault]


@pytest.mark.parametrize("fault", ERRORS)
def test_a_tensor_of_the_wrong_device_and_a_shape_by_values_are_errors(gpu: Gpu, fault: str) -> None:
    assert faulty(gpu, fault)["error"].startswith(ERRORS[fault])


@pytest.mark.parametrize("fault", KERNELS)
def test_a_kernel_that_is_slow_or_keeps_every_score_is_seen(gpu: Gpu, fault: str) -> None:
    device = "7.5" if KERNELS[fault] == "math" else "9.0"
    assert KERNELS[fault] in faulty(gpu, fault, capability=device)["kernels"]  # test_steps finds none without a fault


def test_every_fault_is_tried() -> None:
    assert FAULTS.keys() == {*IN_THE_WINDOW, *ERRORS, *KERNELS}
