"""The dtypes of tensors: torch's name, safetensors' name and bytes an element. No torch."""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """``name`` is torch's, and ours on the command line and in a spec; ``stored`` is safetensors'."""

    name: str
    stored: str
    item_bytes: int


DTYPES = tuple(
    Dtype(*facts)
    for facts in (
        ("float32", "F32", 4), ("bfloat16", "BF16", 2), ("float16", "F16", 2), ("float64", "F64", 8),
        ("float8_e4m3fn", "F8_E4M3", 1), ("float8_e5m2", "F8_E5M2", 1), ("bool", "BOOL", 1),
        ("uint8", "U8", 1), ("uint16", "U16", 2), ("uint32", "U32", 4), ("uint64", "U64", 8),
        ("int8", "I8", 1), ("int16", "I16", 2), ("int32", "I32", 4), ("int64", "I64", 8),
    )
)  # fmt: skip
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
"""What weights may be stored and held in."""
QUANTIZED_DTYPES = ("nf4", "float8", "int8")
"""What the matrices of the blocks may be quantised to, while the rest is held in 16 bits."""
ITEM_BYTES = {dtype.stored: dtype.item_bytes for dtype in DTYPES}
"""Bytes an element by safetensors' names."""
WEIGHT_BYTES = {dtype.name: dtype.item_bytes for dtype in DTYPES if dtype.name in WEIGHT_DTYPES}
"""Bytes of a weight by our names."""
PRECISIONS = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""The dtype of the products' factors, by ``training.precision``. TF32 rounds those in fp32 inside the product."""
