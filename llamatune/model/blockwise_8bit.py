"""Blockwise 8-bit quantisation by the dynamic map of Dettmers et al. 2022 (8-bit optimizers, section 2.1).

Each block of 256 values is divided by its largest magnitude, and each quotient becomes the nearest of 256 levels. The
levels are dense near zero: seven decades, each with twice the levels of the decade below it. It is meant for values of
very different sizes: the moments of Adam, and the scales of NF4 blocks, a few of which are outliers.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
_DECADES = 7


def dynamic_levels(signed: bool) -> Tensor:
    """The 256 levels in rising order, fp32 on the CPU: 0, 1, and the middles of even cells of each decade below 1."""
    levels = [0.0, 1.0]
    for decade in range(_DECADES):
        cells = 2 ** (decade + (0 if signed else 1))
        # In plain floats: under FakeTensorMode, where memory is counted, tensors have no values.
        top = 10.0 ** (decade + 1 - _DECADES)
        middles = [top * (0.1 + 0.9 * (cell + 0.5) / cells) for cell in range(cells)]
        levels += middles + ([-middle for middle in middles] if signed else [])
    return torch.tensor(sorted(levels), dtype=torch.float32, device="cpu")


class BlockwiseCode:
    """The map in both directions, with its tables on one device.

    The unsigned map rounds no positive number to zero. Adam divides by the root of the second moment: if that were
    rounded to zero and the first moment were not, the update would have no bound.
    """

    def __init__(self, signed: bool, device: torch.device) -> None:
        levels = dynamic_levels(signed)
        middles = (levels[1:] + levels[:-1]) / 2
        if not signed:
            middles[0] = 0.0
        # The nearest level without a search: the upper 16 bits of an fp32 number tell of a cell so narrow that one
        # middle between levels lies in it at most. The table holds the number of middles below each cell.
        patterns = torch.arange(1 << 16, dtype=torch.int32, device="cpu") << 16
        least = torch.where(patterns < 0, patterns | 0xFFFF, patterns).view(torch.float32)
        below = torch.bucketize(least.nan_to_num(nan=0.0), middles, out_int32=True)
        self.levels, self.below = levels.to(device), below.to(device)
        self.middles = torch.cat((middles, torch.tensor([torch.inf], device="cpu"))).to(device)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 (256 N,) to uint8 codes (256 N,) and the blocks' largest magnitudes, fp32 (N,)."""
        blocks = x.view(-1, BLOCK)
        largest = blocks.abs().amax(1)  # (N,)
        # A block of zeros divides by the smallest normal number, not by zero.
        quotients = blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        flat = quotients.view(-1)
        below = torch.index_select(self.below, 0, (flat.view(torch.int32) >> 16) & 0xFFFF)
        above = flat > torch.index_select(self.middles, 0, below)
        return below.add_(above).to(torch.uint8), largest

    def decode(self, codes: Tensor, largest: Tensor) -> Tensor:
        """The fp32 values (256 N,) that codes and magnitudes stand for."""
        values = torch.index_select(self.levels, 0, codes.int())
        return (values.view(-1, BLOCK) * largest[:, None]).view(-1)
