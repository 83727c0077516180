"""Attention of the only query of each head on a CPU, as in a step of decoding: by products of matrices, and in fp32.

torch's FlashAttention multiplies keys and values by one row at a time, in 16 bits without the processor's products of
matrices. ``benchmarks/one_query.py`` measures both.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.shapes.tile_sizes import KEYS_IN_CACHES


def by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(E) + mask) v; (B, K, T, E) from q of that shape and k, v (B, K, S, E), mask (B, 1, 1, S).

    Keys are the left factor, which MKL reads faster. A row hardly depends on what is masked behind it or on other rows,
    as it does in FlashAttention: the bits are the same but for very short rows.
    """
    B, K, S, E = k.shape
    queries = q.reshape(B * K, -1, E) * E**-0.5
    scores = torch.bmm(k.flatten(0, 1), queries.transpose(1, 2)).view(B, K, S, -1).transpose(2, 3)
    if mask is not None:
        scores = scores.add_(mask)
    scores = torch.softmax(scores, -1)
    return torch.bmm(scores.flatten(0, 1), v.flatten(0, 1)).view(q.shape)


def in_fp32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same of tensors in 16 bits.

    Some rows of the batch, or some heads of one, at a time: their keys and values in fp32 stay in the caches.
    """
    B, K, S, E = k.shape
    rows, heads = max(1, KEYS_IN_CACHES // (K * S * E)), max(1, KEYS_IN_CACHES // (S * E))
    if rows >= B and heads >= K:
        return _widened(q, k, v, mask)
    o = torch.empty_like(q)
    for row in range(0, B, rows):
        seen = None if mask is None else mask[row : row + rows]
        for head in range(0, K, heads):
            part = slice(row, row + rows), slice(head, head + heads)
            o[part] = _widened(q[part], k[part], v[part], seen)
    return o


def _widened(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    mask = None if mask is None else mask.float()
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)
