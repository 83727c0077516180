"""What a GPU has by its CUDA compute capability. No torch."""

from __future__ import annotations

Capability = tuple[int, int]
"""A GPU's CUDA compute capability: (7, 5) of a T4, (9, 0) of an H100."""

OLDEST_WITH_TENSOR_CORES: Capability = (7, 0)
"""The first to compute products in fp16 several times as fast as in fp32."""

OLDEST_WITH_BF16: Capability = (8, 0)
"""The first to have FlashAttention, bf16 and TF32."""

OLDEST_FOR_TRITON: Capability = (8, 0)
"""The first on which Triton kernels take the place of torch's functions."""

OLDEST_WITH_FP8: Capability = (8, 9)

FEATURES: dict[str, Capability] = {
    "tensor cores": OLDEST_WITH_TENSOR_CORES,
    "bf16": OLDEST_WITH_BF16,
    "TF32": OLDEST_WITH_BF16,
    "FlashAttention": OLDEST_WITH_BF16,
    "Triton kernels": OLDEST_FOR_TRITON,
    "FP8": OLDEST_WITH_FP8,
}


def lacking(capability: Capability) -> tuple[str, ...]:
    """The features that a GPU lacks."""
    return tuple(name for name, oldest in FEATURES.items() if capability < oldest)
