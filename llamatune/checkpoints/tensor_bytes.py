"""Torch tensors to and from the bytes of a file."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from llamatune.checkpoints.weights import StoredWeight, Weight, portions_of
from llamatune.formats.file_range import FileRange
from llamatune.formats.manifest import Staging
from llamatune.formats.safetensors import METADATA, write_safetensors
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
    """A new safetensors file in the order of ``tensors``; one tensor at a time leaves its device."""
    declared = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    stream_tensors(staging, file_name, declared, tensors.values())


def stream_tensors(
    staging: Staging, file_name: str, declared: Sequence[DeclaredTensor], weights: Iterable[Weight]
) -> None:
    """A new safetensors file; each of ``weights`` is taken when the one before it is written."""

    def data() -> Iterator[memoryview | FileRange]:
        for weight, (name, dtype, shape) in zip(weights, declared, strict=True):
            if isinstance(weight, StoredWeight) and (copies := weight.copies(dtype, [shape])) is not None:
                yield from copies
                continue
            left = math.prod(shape)
            for portion in portions_of(weight, dtype):
                left -= portion.numel()
                yield tensor_bytes(portion)
            assert not left, f"{name} has not the shape {shape}"

    stored = [(name, STORED_NAMES[dtype], shape) for name, dtype, shape in declared]
    write_safetensors(staging, file_name, stored, data(), METADATA)


def is_finite(tensor: Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor infinity; one pass, nothing allocated."""
    if not tensor.numel():
        return True
    least, most = tensor.aminmax()
    return bool(torch.isfinite(least) & torch.isfinite(most))
