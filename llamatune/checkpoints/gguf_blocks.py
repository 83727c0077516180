"""Blocks of quantised values in GGUF files: Q8_0 to and from, any other through the package ``gguf``."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatune.errors import CheckpointError, EnvironmentFault

Q8_0, Q8_0_VALUES = "Q8_0", 32
_SCALE_BYTES = 2


def quantized(W: Tensor) -> Tensor:
    """Rows (R, C) as Q8_0, uint8 (R * C / 32, 34): of each 32 values the scale in fp16 and whole numbers up to 127.

    As ``quantize_row_q8_0_ref`` of ggml: the scale is the largest magnitude / 127, halves are rounded away from zero.
    """
    blocks = W.reshape(-1, Q8_0_VALUES).float()
    scales = blocks.abs().amax(1, keepdim=True) / 127
    magnitudes = (blocks * torch.where(scales == 0, 0.0, 1 / scales)).abs()
    whole = magnitudes.floor()
    numbers = torch.where(magnitudes - whole >= 0.5, whole + 1, whole).copysign(blocks).to(torch.int8)
    return torch.cat((scales.half().view(torch.uint8), numbers.view(torch.uint8)), dim=1)


def holds(W: Tensor, type_name: str) -> bool:
    """Whether finite values (R, C) stay finite in a type of at most 16 bits, Q8_0 or F16."""
    largest = torch.stack(W.aminmax()).float().abs().amax()
    return bool((largest / 127 if type_name == Q8_0 else largest).half().isfinite())


def dequantized(blocks: Tensor, type_name: str, tensor_name: str) -> Tensor:
    """The values of blocks, uint8 (N, bytes of one), as fp32 (N, values of one).

    Raises:
        EnvironmentFault: a type that needs the package ``gguf``, which is missing.
        CheckpointError: a type that it does not read.
    """
    if type_name == Q8_0:
        scales = blocks[:, :_SCALE_BYTES].contiguous().view(torch.float16).float()
        return scales * blocks[:, _SCALE_BYTES:].contiguous().view(torch.int8).float()
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        what = f"{tensor_name} is quantised as {type_name}, which is read through the package gguf"
        raise EnvironmentFault(what, None, "pip install gguf") from None
    try:
        values = dequantize(blocks.numpy(), GGMLQuantizationType[type_name])
    except (KeyError, NotImplementedError):
        what = f"{tensor_name} is quantised as {type_name}, which the package gguf does not read"
        raise CheckpointError(what, None, "give a GGUF file in F16, BF16 or Q8_0") from None
    return torch.from_numpy(values)
