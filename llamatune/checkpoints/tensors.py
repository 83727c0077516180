"""Torch tensors to and from the bytes of a file."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from llamatune.durable_writing import writing
from llamatune.formats.manifest import Staging
from llamatune.formats.safetensors import TensorWriter, data_bytes

DTYPE_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip
"""safetensors' names of the dtypes that we write."""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor without a copy (and without numpy); the tensor must outlive the view."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def write_tensors(staging: Staging, file_name: str, tensors: Mapping[str, Tensor]) -> None:
    """A new safetensors file, synced, in the order of ``tensors``; one tensor at a time leaves its device."""
    declared = [(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with writing(staging.path / file_name, data_bytes(declared)) as file:
        writer = TensorWriter(file, declared, {"format": "pt"})
        for tensor in tensors.values():
            held = tensor.detach().cpu().contiguous()
            writer.write(tensor_bytes(held))
        staging.digests[file_name] = writer.finish()


def is_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity; one pass, nothing allocated."""
    if not tensor.numel():
        return True
    least, most = tensor.aminmax()
    return bool(torch.isfinite(least) & torch.isfinite(most))
