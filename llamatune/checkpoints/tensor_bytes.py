"""Torch tensors to and from the bytes of a file."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llamatune.formats.manifest import Staging
from llamatune.formats.safetensors import write_safetensors
from llamatune.model.torch_dtypes import STORED_NAMES

DeclaredTensor = tuple[str, torch.dtype, tuple[int, ...]]
"""A tensor to be written: name, dtype and shape."""


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
    declared = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    stream_tensors(staging, file_name, declared, tensors.values())


def stream_tensors(
    staging: Staging, file_name: str, declared: Sequence[DeclaredTensor], tensors: Iterable[Tensor]
) -> None:
    """A new safetensors file, synced; each of ``tensors`` is taken when the one before it is written."""

    def data() -> Iterator[memoryview]:
        for tensor, (name, dtype, shape) in zip(tensors, declared, strict=True):
            on_cpu = tensor.detach().to("cpu", dtype).contiguous()
            assert tuple(on_cpu.shape) == shape, f"{name} has the shape {tuple(on_cpu.shape)}"
            yield tensor_bytes(on_cpu)

    stored = [(name, STORED_NAMES[dtype], shape) for name, dtype, shape in declared]
    write_safetensors(staging, file_name, stored, data(), {"format": "pt"})


def is_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity; one pass, nothing allocated."""
    if not tensor.numel():
        return True
    least, most = tensor.aminmax()
    return bool(torch.isfinite(least) & torch.isfinite(most))
