"""Cross-entropy of rows of logits, and its derivative in their place; computed in fp32, rounded once.

One program computes a row: it reads it for the largest logit and the sum, then backwards, while its end is still in a
cache, for what is written. The rows' losses are added up in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 16384
_WARPS = 16


@triton.jit
def _largest_and_sum(row, vocabulary, BLOCK: tl.constexpr):
    """The largest logit and the sum of exp(logit - largest)."""
    largest, total = float("-inf"), 0.0
    for first in range(0, vocabulary, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        raised = tl.maximum(largest, tl.max(x, 0))
        shift = tl.where(raised == float("-inf"), 0.0, raised)  # logits so far may all be -inf
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), 0)
        largest = raised
    return largest, total


@triton.jit
def _cross_entropy(logits, targets, losses, vocabulary, WANTS_SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    row = logits + tl.program_id(0).to(tl.int64) * vocabulary
    target = tl.load(targets + tl.program_id(0))
    wanted = tl.load(row + target).to(tl.float32)  # before it is overwritten
    largest, total = _largest_and_sum(row, vocabulary, BLOCK)
    tl.store(losses + tl.program_id(0), tl.log(total) - (wanted - largest))
    if WANTS_SLOPE:
        last = (vocabulary - 1) // BLOCK * BLOCK
        for passed in range(0, vocabulary, BLOCK):
            at = last - passed + tl.arange(0, BLOCK)
            x = tl.load(row + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
            slope = tl.exp(x - largest) / total - tl.where(at == target, 1.0, 0.0)
            tl.store(row + at, slope, mask=at < vocabulary)


@triton.jit
def _token_losses(logits, targets, losses, correct, vocabulary, BLOCK: tl.constexpr):
    row = logits + tl.program_id(0).to(tl.int64) * vocabulary
    target = tl.load(targets + tl.program_id(0))
    wanted = tl.load(row + target).to(tl.float32)
    largest, total = _largest_and_sum(row, vocabulary, BLOCK)
    tl.store(losses + tl.program_id(0), tl.log(total) - (wanted - largest))
    as_large = 0  # logits before the target: of several largest ones the first counts
    for first in range(0, target, BLOCK):
        at = first + tl.arange(0, BLOCK)
        x = tl.load(row + at, mask=at < target, other=float("-inf")).to(tl.float32)
        as_large += tl.sum(((x >= wanted) & (at < target)).to(tl.int32), 0)
    tl.store(correct + tl.program_id(0), (wanted == largest) & (as_large == 0))


def _block(vocabulary: int) -> int:
    return min(_LARGEST_BLOCK, 1 << (vocabulary - 1).bit_length())


def summed_cross_entropy(logits: Tensor, targets: Tensor, wants_slope: bool) -> Tensor:
    """The summed loss in fp32; its derivative takes the place of the contiguous logits (P, V)."""
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy[(rows,)](
        logits, targets, losses, vocabulary, WANTS_SLOPE=wants_slope, BLOCK=_block(vocabulary), num_warps=_WARPS
    )
    return losses.sum()


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row in fp32, and whether its target was the likeliest."""
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    correct = torch.empty(rows, dtype=torch.bool, device=logits.device)
    _token_losses[(rows,)](logits, targets, losses, correct, vocabulary, BLOCK=_block(vocabulary), num_warps=_WARPS)
    return losses, correct
