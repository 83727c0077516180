"""NF4 unpacking in one pass: 0.516 bytes of codes and scales a weight are read and the weight is written.

Every operation rounds as the plain function's: none is joined with another to a fused multiply-add.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from llamatune.model.blockwise_8bit import BlockwiseCode

_BLOCKS_AT_ONCE = 16  # four bytes of codes a thread: its eight 16-bit weights are one store of 16 bytes


@triton.jit
def _nf4_unpacking(
    codes, scale_codes, scale_factors, scale_mean, scale_levels, pairs, out, blocks, BLOCKS_AT_ONCE: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS_AT_ONCE + tl.arange(0, BLOCKS_AT_ONCE)
    inside = block < blocks
    level = tl.load(scale_levels + tl.load(scale_codes + block, mask=inside, other=0).to(tl.int32))
    scale = level * tl.load(scale_factors + block // 256, mask=inside, other=0.0) + tl.load(scale_mean)
    at = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    both = tl.load(codes + at, mask=inside[:, None], other=0).to(tl.int32)
    # The second level of the byte 0x0n is level n: 16 levels in one line of the cache.
    high = tl.load(pairs + 2 * (both >> 4) + 1).to(tl.float32) * scale[:, None]
    low = tl.load(pairs + 2 * (both & 15) + 1).to(tl.float32) * scale[:, None]
    dtype: tl.constexpr = out.dtype.element_ty
    weights = tl.interleave(high.to(dtype), low.to(dtype))
    tl.store(out + block[:, None] * 64 + tl.arange(0, 64)[None, :], weights, mask=inside[:, None])


def unpack(
    codes: Tensor,
    scale_codes: Tensor,
    scale_factors: Tensor,
    scale_mean: Tensor,
    scale_code: BlockwiseCode,
    pairs: Tensor,
    out: Tensor,
) -> None:
    """Write all weights, whole blocks of 64, into ``out``."""
    blocks = len(out) // 64
    _nf4_unpacking[(triton.cdiv(blocks, _BLOCKS_AT_ONCE),)](
        codes, scale_codes, scale_factors, scale_mean, scale_code.levels, pairs.view(out.dtype), out, blocks,
        BLOCKS_AT_ONCE=_BLOCKS_AT_ONCE, enable_fp_fusion=False,
    )  # fmt: skip
