"""8-bit AdamW in one pass over weights, gradients and state of all parameters.

Everything rounds as torch's own kernels round it on a GPU: fused multiply-adds where they have them (lerp, addcmul) and
nowhere else, quotients and roots to the nearest. On a CPU torch multiplies in addcmul in another order, and a few of
its roots differ in their last bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llamatune.model.blockwise_8bit import BlockwiseCode

_BLOCKS_AT_ONCE = 4
_PROGRAMS = 1024
"""At most so many programs share a parameter; each passes over it in strides."""

_TENSORS = ("exp_avg", "exp_avg_largest", "exp_avg_sq", "exp_avg_sq_largest")


@triton.jit
def _decode(codes, largest, at, block, inside, levels):
    level = tl.load(levels + tl.load(codes + at, mask=inside[:, None], other=0).to(tl.int32))
    return level * tl.load(largest + block, mask=inside, other=0.0)[:, None]


@triton.jit
def _encode(moment, codes, largest, at, block, inside, below, middles):
    # Numbers without their signs compare as their bits do; NaN is above all, as in torch.
    magnitude = tl.max(moment.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    tiny = 1.1754943508222875e-38  # the smallest normal number
    quotient = tl.div_rn(moment, tl.where(magnitude < tiny, tiny, magnitude)[:, None])
    cell = tl.load(below + ((quotient.to(tl.int32, bitcast=True) >> 16) & 0xFFFF))
    code = cell + (quotient > tl.load(middles + cell)).to(tl.int32)
    tl.store(codes + at, code.to(tl.uint8), mask=inside[:, None])
    tl.store(largest + block, magnitude, mask=inside)


@triton.jit
def _adamw_8bit(
    addresses, first_levels, first_below, first_middles, second_levels, second_below, second_middles,
    grad_share, beta2, square_share, root, eps, rate, kept, BLOCKS_AT_ONCE: tl.constexpr,
):  # fmt: skip
    of_run = addresses + tl.program_id(0) * 7
    weights = tl.load(of_run).to(tl.pointer_type(tl.float32))
    grads = tl.load(of_run + 1).to(tl.pointer_type(tl.float32))
    first_codes = tl.load(of_run + 2).to(tl.pointer_type(tl.uint8))
    first_largest = tl.load(of_run + 3).to(tl.pointer_type(tl.float32))
    second_codes = tl.load(of_run + 4).to(tl.pointer_type(tl.uint8))
    second_largest = tl.load(of_run + 5).to(tl.pointer_type(tl.float32))
    count = tl.load(of_run + 6)
    blocks = tl.cdiv(count, 256)
    for start in range(tl.program_id(1) * BLOCKS_AT_ONCE, blocks, tl.num_programs(1) * BLOCKS_AT_ONCE):
        block = start + tl.arange(0, BLOCKS_AT_ONCE).to(tl.int64)
        inside = block < blocks
        at = block[:, None] * 256 + tl.arange(0, 256)[None, :]
        grad = tl.load(grads + at, mask=at < count, other=0.0)
        weight = tl.load(weights + at, mask=at < count, other=0.0)
        first = _decode(first_codes, first_largest, at, block, inside, first_levels)
        second = _decode(second_codes, second_largest, at, block, inside, second_levels)
        # As torch.lerp: from the nearer end.
        if grad_share < 0.5:
            first = tl.fma(grad - first, grad_share, first)
        else:
            first = tl.fma(grad - first, grad_share - 1, grad)
        second = tl.fma(grad * grad, square_share, second * beta2)
        change = tl.div_rn(first, tl.sqrt_rn(second) * tl.div_rn(1.0, root) + eps) * -rate  # as torch.div by a number
        tl.store(weights + at, weight * kept + change, mask=at < count)
        _encode(first, first_codes, first_largest, at, block, inside, first_below, first_middles)
        _encode(second, second_codes, second_largest, at, block, inside, second_below, second_middles)


def update_quantized(
    weights: list[Tensor],
    grads: list[Tensor],
    states: list[dict[str, Tensor]],
    codes: tuple[BlockwiseCode, BlockwiseCode],
    numbers: tuple[float, float, float, float, float, float],
) -> None:
    """One launch for all fp32 weights; their addresses reach the GPU without a wait."""
    beta1, beta2, root, eps, rate, kept = numbers
    assert all(weight.dtype == torch.float32 for weight in weights)
    grads = [grad.float() for grad in grads]  # held until the launch
    rows = [
        [weight.data_ptr(), grad.data_ptr(), *(state[name].data_ptr() for name in _TENSORS), len(weight)]
        for weight, grad, state in zip(weights, grads, states, strict=True)
    ]
    addresses = torch.tensor(rows, dtype=torch.int64, device="cpu")
    if weights[0].is_cuda:
        addresses = addresses.pin_memory().to(weights[0].device, non_blocking=True)
    shares = triton.cdiv(max(map(len, weights)), 256 * _BLOCKS_AT_ONCE)
    tables = [table for code in codes for table in (code.levels, code.below, code.middles)]
    _adamw_8bit[(len(weights), min(shares, _PROGRAMS))](
        addresses, *tables, 1 - beta1, beta2, 1 - beta2, root, eps, rate, kept,
        BLOCKS_AT_ONCE=_BLOCKS_AT_ONCE, enable_fp_fusion=False,
    )  # fmt: skip
