"""What e4m3 can hold, and whether a product with a float8 matrix is computed in float8 (``torch._scaled_mm``).

One rule for the model and for the memory plan. No torch.
"""

from __future__ import annotations

from llamatune.shapes.capabilities import OLDEST_WITH_FP8, Capability

LARGEST = 448.0
"""The largest e4m3; what rounds to more is NaN or ``LARGEST``, by the version of torch."""

LEAST_SCALE = 2.0**-126
"""The least normal fp32: rows of zeros, or of less than it can scale, divide by it."""

_WHOLE = 16
"""``torch._scaled_mm`` wants both dimensions of its second factor, of one byte an element, in whole 16 bytes."""


def runs_in_float8(capability: Capability | None, computed: str, shape: tuple[int, ...]) -> bool:
    """Whether products with a matrix of this shape run in ``torch._scaled_mm`` with a scale for each row.

    torch 2.10 to 2.14, built for CUDA 12 or 13, have such kernels for the compute capabilities 8.9, 9.x, 10.x and 12.x
    (``RowwiseScaledMM.cu``), and for 9.x in cuBLAS 12.9 (``ScaledBlas.cpp``). All of them give bf16; fp16 and fp32 came
    later, and a product in float8 would not be what fp32 is asked for.

    Args:
        capability: None is a CPU. Its ``torch._scaled_mm`` is slower than a product in bf16.
        computed: the dtype that products are asked for in.
    """
    if capability is None or computed != "bfloat16" or any(size % _WHOLE for size in shape):
        return False
    return capability == OLDEST_WITH_FP8 or capability[0] in (9, 10, 12)
