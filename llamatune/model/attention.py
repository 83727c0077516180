"""Attention within samples: one function over every kernel that computes it.

A row of a training batch holds several samples, one after another, and no padding. Each sees itself alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.shapes.limits import SHORT_TOKENS


@dataclass(frozen=True)
class Documents:
    """Samples that stand one after another in one row of N tokens.

    ``positions`` (1, N) restart with each; ``bounds`` (samples + 1,) int32 are where they begin and end.
    """

    lengths: tuple[int, ...]
    positions: Tensor
    bounds: Tensor

    @staticmethod
    def of(lengths: tuple[int, ...], device: torch.device) -> Documents:
        """The layout of samples of these lengths, on ``device``."""
        sizes = torch.tensor(lengths)
        ends = sizes.cumsum(0)
        positions = torch.arange(int(ends[-1])) - (ends - sizes).repeat_interleave(sizes)
        bounds = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(torch.int32)
        return Documents(lengths, positions[None].to(device, non_blocking=True), bounds.to(device, non_blocking=True))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, documents: Documents | None) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, causal; (B, H, T, E) from q of that shape and k, v (B, K, S, E).

    Args:
        mask: bool (B, 1, T, S), True where a query may look, in place of causality.
        documents: B is 1 and the row holds these samples; each attends to itself alone.
    """
    if mask is not None or q.shape[2] != k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    if documents is None or len(documents.lengths) == 1:
        return _attend_causally(q, k, v)
    varlen = _varlen_kernel() if q.is_cuda and q.dtype != torch.float32 else None
    if varlen is not None:
        return varlen(q, k, v, documents)
    lengths = list(documents.lengths)
    if len(set(lengths)) == 1:
        return _attend_to_equal(q, k, v, len(lengths))
    samples = zip(*(torch.split(x, lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([_attend_causally(*sample) for sample in samples], dim=2)


def _attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    T = q.shape[2]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or T > SHORT_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=True)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, H, T, T)
    later = torch.ones(T, T, dtype=torch.bool).triu(1)
    shares: Tensor = scores.masked_fill(later, -torch.inf).softmax(-1, dtype=torch.float32)
    return shares.to(v.dtype) @ v


def _attend_to_equal(q: Tensor, k: Tensor, v: Tensor, samples: int) -> Tensor:
    """Samples of one length are a batch: one call, and its output is kept once."""
    H, N, E = q.shape[1:]
    q, k, v = (x.transpose(1, 2).reshape(samples, N // samples, -1, E).transpose(1, 2) for x in (q, k, v))
    o = _attend_causally(q, k, v)  # (samples, H, N / samples, E)
    return o.transpose(1, 2).reshape(1, N, H, E).transpose(1, 2)


@functools.cache
def _varlen_kernel() -> Callable[[Tensor, Tensor, Tensor, Documents], Tensor] | None:
    """FlashAttention over ragged samples, where torch has it and the GPU runs it (compute capability 8 and up)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if torch.cuda.get_device_capability() < (8, 0):
        return None
    # The way to ask for causality changed between releases.
    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

    def kernel(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))  # (N, H, E)
        longest = max(documents.lengths)
        out = varlen_attn(q, k, v, documents.bounds, documents.bounds, longest, longest, **causal)
        assert isinstance(out, Tensor)
        return out.transpose(0, 1)[None]  # (1, H, N, E)

    return kernel
