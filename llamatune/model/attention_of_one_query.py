"""Attention of one query for each head on a CPU, in decoding: torch's kernel, doubled queries, fp32, or two products.

torch's FlashAttention multiplies keys and values by one row, which MKL does slowly: in bf16 two rows take about half of
the time, in fp16 any number takes several times as long as in fp32, and fp32 is read at half of the memory's bandwidth.
``benchmarks/attention_of_one_query.py`` measures ``attend`` against it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.shapes.attention_kernels import WIDENED_AT_ONCE, OneQuery


def attend_one_query(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, way: OneQuery) -> Tensor:
    """softmax(q k^T / sqrt(E) + mask) v; (B, K, T, E) from q of that shape and k, v (B, K, S, E), mask (B, 1, 1, S)."""
    match way:
        case OneQuery.TWICE:
            return F.scaled_dot_product_attention(torch.cat((q, q), dim=2), k, v, attn_mask=mask)[:, :, : q.shape[2]]
        case OneQuery.WIDENED:
            return _widened(q, k, v, mask)
        case OneQuery.PRODUCTS:
            return _by_products(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """By two products of matrices in fp32.

    Keys are the left factor, which MKL reads faster. The bits of a row depend less often on other rows, and on what is
    masked behind it, than those of FlashAttention.
    """
    B, K, S, E = k.shape
    queries = q.reshape(B * K, -1, E) * E**-0.5
    scores = torch.bmm(k.flatten(0, 1), queries.transpose(1, 2)).view(B, K, S, -1).transpose(2, 3)
    scores = scores.contiguous()  # here and not within softmax, so that only two such matrices are there at once
    if mask is not None:
        scores = scores.add_(mask)
    scores = torch.softmax(scores, -1)
    return torch.bmm(scores.flatten(0, 1), v.flatten(0, 1)).view(q.shape)


def _widened(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """In fp32, some rows of the batch, or some heads of one, at a time: their keys and values stay in the caches."""
    B, K, S, E = k.shape
    rows, heads = max(1, WIDENED_AT_ONCE // (K * S * E)), max(1, WIDENED_AT_ONCE // (S * E))
    # Of one size: what is as long as the keys would be of another size in each step, and take other memory.
    room = torch.empty(2, max(WIDENED_AT_ONCE, S * E), dtype=torch.float32)
    wide, o = q.float(), torch.empty_like(q)
    added = None if mask is None else mask.float()
    for row in range(0, B, rows):
        seen = None if added is None else added[row : row + rows]
        for head in range(0, K, heads):
            part = slice(row, row + rows), slice(head, head + heads)
            keys, values = (_copied(x[part], to) for x, to in zip((k, v), room, strict=True))
            o[part] = F.scaled_dot_product_attention(wide[part], keys, values, attn_mask=seen)
    return o


def _copied(x: Tensor, room: Tensor) -> Tensor:
    """In the first places of ``room``, in its dtype."""
    return room[: x.numel()].view(x.shape).copy_(x)
