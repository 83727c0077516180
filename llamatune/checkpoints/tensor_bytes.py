"""Torch tensors to and from the bytes of a file."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from llamatune.durable_writing import writing
from llamatune.formats.manifest import Staging
from llamatune.formats.safetensors import TensorWriter, data_bytes
from llamatune.model.torch_dtypes import STORED_NAMES


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
    declared = [(name, STORED_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with writing(staging.path / file_name, data_bytes(declared)) as file:
        writer = TensorWriter(file, declared, {"format": "pt"})
        for tensor in tensors.values():
            on_cpu = tensor.detach().cpu().contiguous()
            writer.write(tensor_bytes(on_cpu))
        staging.digests[file_name] = writer.finish()


def is_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity; one pass, nothing allocated."""
    if not tensor.numel():
        return True
    least, most = tensor.aminmax()
    return bool(torch.isfinite(least) & torch.isfinite(most))
