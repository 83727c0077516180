"""NF4 quantisation of frozen weights to 4 bits (QLoRA, Dettmers et al. 2023, section 3), 0.516 bytes a weight.

A matrix is read row after row in blocks of 64. Each weight becomes the nearest of 16 levels, the quantiles of a normal
distribution, times its block's scale. The scales (the blocks' largest magnitudes) are quantised too: their mean is
subtracted, and the rest is held in 8 bits in blocks of 256 (section 3, "double quantization"). Unlike in the paper,
levels are chosen with the scale as it will be read back, which is never worse.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model import blockwise_8bit
from llamatune.model.blockwise_8bit import BlockwiseCode
from llamatune.model.compiled_functions import compilable, is_compiling
from llamatune.model.kernels.choice import by_kernel
from llamatune.model.packed_weight import PackedWeight, Scratch
from llamatune.shapes.tile_sizes import WEIGHTS_AT_ONCE

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Appendix E of the paper."""
_MIDDLES = tuple((low + high) / 2 for low, high in itertools.pairwise(LEVELS))


class NF4Weight(PackedWeight):
    """A frozen matrix (out, in) in NF4."""

    codes: Tensor
    scale_codes: Tensor
    scale_factors: Tensor
    scale_mean: Tensor

    @staticmethod
    def storage(shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        blocks = -(-math.prod(shape) // BLOCK)
        groups = -(-blocks // blockwise_8bit.BLOCK)
        return {
            "codes": (torch.uint8, (blocks * BLOCK // 2,)),
            "scale_codes": (torch.uint8, (groups * blockwise_8bit.BLOCK,)),
            "scale_factors": (torch.float32, (groups,)),
            "scale_mean": (torch.float32, ()),
        }

    @classmethod
    @torch.no_grad()
    def quantize(cls, W: Tensor, scratch: Scratch) -> Self:
        flat = W.detach().reshape(-1)
        shapes = cls.storage(tuple(W.shape))
        scales = torch.cat([piece.abs().amax(1) for piece in _pieces(flat)])
        # Summed in fp64, so that thread count and device cannot move its last bit.
        mean = scales.double().mean().float()
        padding = shapes["scale_codes"][1][0] - len(scales)
        scale_codes, factors = code_of_scales(scratch, W.device).encode(F.pad(scales - mean, (0, padding)))
        tensors = {"scale_codes": scale_codes, "scale_factors": factors, "scale_mean": mean}
        tensors["codes"] = torch.empty(shapes["codes"][1], dtype=torch.uint8, device=W.device)
        weight = cls(tuple(W.shape), tensors, scratch)
        scales, begin = weight.scales(), 0
        for piece in _pieces(flat):
            # A scale that came back as zero gives NaN or infinity here and zeros later, whatever the code.
            codes = _nearest(piece / scales[begin : begin + len(piece), None]).view(-1, 2)
            first = begin * BLOCK // 2
            torch.add(codes[:, 0] << 4, codes[:, 1], out=weight.codes[first : first + len(codes)])
            begin += len(piece)
        return weight

    def scales(self) -> Tensor:
        """The blocks' scales as read back, fp32 (blocks,)."""
        code, blocks = code_of_scales(self.scratch, self.device), len(self.codes) * 2 // BLOCK
        return block_scales(self.scale_codes, self.scale_factors, self.scale_mean, code)[:blocks]

    @property
    def room(self) -> int:
        return len(self.codes) * 2

    def unpack_into(self, flat: Tensor) -> None:
        code, pairs = code_of_scales(self.scratch, self.device), pairs_of_levels(self.scratch, flat.dtype, self.device)
        unpack(self.codes, self.scale_codes, self.scale_factors, self.scale_mean, code, pairs, flat)


def pairs_of_levels(scratch: Scratch, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each of the 256 bytes its two levels in ``dtype``, seen as one integer twice as wide.

    One gather of 256 integers then unpacks two weights (first the high nibble).
    """
    return scratch.table(_pairs_of_levels, dtype, device)  # type: ignore[no-any-return]


def _pairs_of_levels(dtype: torch.dtype, device: torch.device) -> Tensor:
    levels = torch.tensor(LEVELS, dtype=dtype, device=device)
    table = torch.cartesian_prod(levels, levels).contiguous()  # (256, 2)
    assert dtype.itemsize in (2, 4), f"no NF4 matrix is unpacked to {dtype}"
    return table.view(torch.int32 if dtype.itemsize == 2 else torch.int64).view(-1)


def code_of_scales(scratch: Scratch, device: torch.device) -> BlockwiseCode:
    """The 8-bit code of the scales."""
    return scratch.table(BlockwiseCode, True, device)  # type: ignore[no-any-return]


def block_scales(scale_codes: Tensor, scale_factors: Tensor, scale_mean: Tensor, scale_code: BlockwiseCode) -> Tensor:
    """The scales that codes, factors and mean stand for, fp32, whole groups of 256."""
    return scale_code.decode(scale_codes, scale_factors) + scale_mean


@by_kernel("nf4_unpacking")
def unpack(
    codes: Tensor,
    scale_codes: Tensor,
    scale_factors: Tensor,
    scale_mean: Tensor,
    scale_code: BlockwiseCode,
    pairs: Tensor,
    out: Tensor,
) -> None:
    """Write the weights (64 N,) of the tensors of ``storage`` into ``out``; ``pairs`` are the scratch's."""
    scales = block_scales(scale_codes, scale_factors, scale_mean, scale_code)[: len(out) // BLOCK]
    if is_compiling() and out.is_cuda:  # a CPU is faster in pieces that stay in its cache
        dequantize_at_once(codes.view(-1, BLOCK // 2), scales[:, None], pairs.view(out.dtype), out.view(-1, BLOCK))
    else:
        dequantize(codes, scales, pairs, out)


def dequantize(codes: Tensor, scales: Tensor, pairs: Tensor, out: Tensor) -> None:
    """Write the weights (64 N,) of ``codes`` (32 N,) and fp32 ``scales`` (N,) into ``out``, a piece at a time.

    A level rounded to out's dtype is multiplied in fp32 and rounded once more: within 2⁻⁸ in bf16, exact in fp32.
    """
    step = WEIGHTS_AT_ONCE[out.device.type]
    for begin in range(0, len(out), step):
        piece = out[begin : begin + step]
        bytes_of_piece = codes[begin // 2 : (begin + step) // 2].int()
        torch.index_select(pairs, 0, bytes_of_piece, out=piece.view(pairs.dtype))
        piece.view(-1, BLOCK).mul_(scales[begin // BLOCK : (begin + step) // BLOCK, None])


@compilable
def dequantize_at_once(codes: Tensor, scales: Tensor, pairs: Tensor, out: Tensor) -> None:
    """The same to the bit from codes (N, 32), scales (N, 1) and levels in out's dtype (512,) to out (N, 64)."""
    out.copy_(pairs.view(256, 2)[codes.int()].view(out.shape) * scales)


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    """The weights in fp32, (blocks, 64) at a time; zeros fill the last block."""
    for piece in torch.split(flat, WEIGHTS_AT_ONCE[flat.device.type]):
        wide, missing = piece.float(), -len(piece) % BLOCK
        yield (F.pad(wide, (0, missing)) if missing else wide).view(-1, BLOCK)


def _nearest(quotients: Tensor) -> Tensor:
    """The numbers (uint8) of the nearest levels: how many of the 15 middles between levels lie below each quotient.

    Fifteen comparisons are three times as fast as ``torch.bucketize`` on a CPU, and give the same.
    """
    count = torch.zeros(quotients.shape, dtype=torch.uint8, device=quotients.device)
    above = torch.empty(quotients.shape, dtype=torch.bool, device=quotients.device)
    for middle in _MIDDLES:
        count.add_(torch.gt(quotients, middle, out=above).view(torch.uint8))
    return count
