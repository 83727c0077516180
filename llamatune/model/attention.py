"""Scaled dot-product attention, causal within each sample, by the kernel that ``choose_kernel`` names.

A row of a training batch holds several samples, one after another, without padding. A sample attends to itself only.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.devices import capability_of
from llamatune.model.attention_in_fp32 import CPU_KERNEL, attend_in_fp32
from llamatune.model.attention_of_one_query import attend_one_query
from llamatune.model.rows_by_length import Groups
from llamatune.model.torch_dtypes import DTYPE_NAMES
from llamatune.processor import has_amx
from llamatune.shapes.attention_kernels import (
    Kernel,
    beyond_window,
    choose_for_one_query,
    choose_kernel,
    head_room,
    takes_mask,
)
from llamatune.shapes.recurring_sizes import filled_up


class Documents:
    """Samples that stand one after another in one row of N tokens.

    ``positions`` (1, N) restart with each; ``bounds`` (samples + 1,) int32 are where they begin and end. ``masks`` are
    those of the samples that are longer than the sliding window, by their lengths, in the dtype of the scores: every
    block adds the same.
    """

    def __init__(
        self,
        lengths: tuple[int, ...],
        device: torch.device,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        sizes = torch.tensor(lengths)
        ends = sizes.cumsum(0)
        positions = torch.arange(int(ends[-1])) - (ends - sizes).repeat_interleave(sizes)
        bounds = torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(torch.int32)
        self.lengths, self.positions = lengths, positions[None].to(device, non_blocking=True)
        self.bounds = bounds.to(device, non_blocking=True)
        self.masks = {T: _window_mask(T, window or 0, device, dtype) for T in beyond_window(lengths, window)}

    def lengths_by_token(self) -> Tensor:
        """(1, N)."""
        sizes = torch.tensor(self.lengths)
        return sizes.repeat_interleave(sizes)[None].to(self.bounds.device, non_blocking=True)


def mask_behind(start: int, queries: int, window: int | None, device: torch.device) -> Tensor | None:
    """Bool (1, 1, queries, start + queries): what the queries from place ``start`` on see, within a sliding window.

    None where ``attend`` needs no mask for it.
    """
    if not takes_mask(start, queries, window, device.type):
        return None
    places = torch.arange(start + queries, device=device)
    inside = _inside(places[start:, None], places, window) if window is not None else places <= places[start:, None]
    return inside[None, None]


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What torch's kernels on a CPU make of a bool ``mask`` in every call: 0 where it is True and -inf elsewhere."""
    return torch.where(mask, torch.zeros((), dtype=dtype), torch.full((), -torch.inf, dtype=dtype))


def _inside(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Which keys their query sees, by places (T, 1) and (S,)."""
    return (keys <= queries) & (keys > queries - window)


def _window_mask(T: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 where a query sees a key and -inf elsewhere, (1, 1, T, T); each row of it begins at whole 16 bytes."""
    room = torch.zeros(T, -(-T // 8) * 8, device=device, dtype=dtype)[:, :T]
    places = torch.arange(T, device=device)
    return room.masked_fill_(~_inside(places[:, None], places, window), -torch.inf)[None, None]


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, documents: Documents | None, groups: Groups = ()
) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, causal; (B, H, T, E) from q of that shape and k, v (B, K, S, E).

    The queries are the last T of S tokens.

    Args:
        mask: (B, 1, T, S), bool, True where a query may look, or ``added`` to scores; in place of causality. None only
            where ``takes_mask`` says so.
        documents: B is 1 and the row holds these samples; each attends to itself only.
        groups: of rows, each with the keys of its longest row; ``mask`` hides what is beyond a row's own.
    """
    if groups:
        return _attend_in_groups(q, k, v, mask, groups)
    if mask is None and 1 < q.shape[2] < k.shape[2]:
        return _attend_in_parts(q, k, v)
    if mask is not None or q.shape[2] != k.shape[2]:
        kind = "none" if mask is None else "given"
        if q.shape[2] == 1 and _pays_grouped(q, k):
            return _attend_one(_grouped(q, k), k, v, kind, mask).reshape(q.shape)
        return _attend(q, k, v, kind, mask)
    if documents is None or len(documents.lengths) == 1:
        return _attend_to_sample(q, k, v, documents)
    lengths = list(documents.lengths)
    _, _, N, E = q.shape
    if not documents.masks:
        if choose_kernel(capability_of(q.device), DTYPE_NAMES[q.dtype], E, N, len(lengths)) is Kernel.VARLEN:
            return _attend_to_ragged(q, k, v, documents)
        if len(set(lengths)) == 1:
            return _attend_to_equal(q, k, v, len(lengths))
    samples = zip(*(torch.split(x, lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([_attend_to_sample(q, k, v, documents) for q, k, v in samples], dim=2)


def _attend_to_sample(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
    """One sample, or a batch of them, (B, H, T, E); masked where it is longer than the window."""
    mask = None if documents is None else documents.masks.get(q.shape[2])
    return _attend(q, k, v) if mask is None else _attend(q, k, v, "given", mask)


def _attend(q: Tensor, k: Tensor, v: Tensor, kind: str = "causal", mask: Tensor | None = None) -> Tensor:
    """One call for a batch whose rows are one sample each; ``kind`` of mask as ``choose_kernel`` has it."""
    _, _, T, E = q.shape
    capability, dtype = capability_of(q.device), DTYPE_NAMES[q.dtype]
    # Generation fills prompts up with AMX, without which little is compiled for a new number of tokens. A training step
    # takes the same kernel whether its pass is for gradients or not.
    recurs = torch.is_inference_mode_enabled() and (not has_amx() or filled_up(T, q.device.type, q.element_size()) == T)
    kernel = choose_kernel(capability, dtype, E, T, 1, kind, recurs)
    causal = kind == "causal" and T > 1
    if kernel is Kernel.FP32:
        return attend_in_fp32(q, k, v)
    if kernel is Kernel.SDPA:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    k, v = _repeated(q, k, v)
    missing = head_room(kernel, capability, dtype, E) - E
    if missing:
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=E**-0.5)
    return o[..., :E] if missing else o


def _attend_in_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: Groups) -> Tensor:
    """Each group of rows with the keys that it sees."""
    assert mask is not None, "a row may be shorter than its group"
    found, begin = [], 0
    for rows, keys in groups:
        part, begin = slice(begin, begin + rows), begin + rows
        found.append(attend(q[part], k[part, :, :keys], v[part, :, :keys], mask[part, ..., :keys], None))
    return torch.cat(found)


def _attend_in_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last T of S tokens on a CPU, without gradients: tokens before them, then themselves, joined by softmax sums.

    No mask is added. Queries that share a head of k are computed as queries of one head, in larger blocks.
    """
    assert not torch.is_grad_enabled(), "the sums have no gradient"
    B, H, T, E = q.shape
    keys, own_keys = torch.split(k, [k.shape[2] - T, T], dim=2)
    values, own_values = torch.split(v, [k.shape[2] - T, T], dim=2)
    before, sums = CPU_KERNEL(q.reshape(B, k.shape[1], -1, E), keys, values)
    own, own_sums = CPU_KERNEL(q, own_keys, own_values, 0.0, True)  # logarithms of sums, in fp32 or more
    share = torch.sigmoid(sums.reshape(B, H, T) - own_sums)[..., None]
    o: Tensor = own.to(share.dtype).lerp_(before.reshape(q.shape).to(share.dtype), share)
    return o.to(q.dtype)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, kind: str, mask: Tensor | None) -> Tensor:
    """The only queries of heads that share one of k, (B, K, H / K, E)."""
    if q.is_cpu and torch.is_inference_mode_enabled() and not has_amx():
        return attend_one_query(q, k, v, mask, choose_for_one_query(DTYPE_NAMES[q.dtype], q.shape[2], k.numel()))
    return _attend(q, k, v, kind, mask)


def _pays_grouped(q: Tensor, k: Tensor) -> bool:
    """Whether ``_grouped`` is no slower: not for two heads or three in bf16 on a CPU with AMX, by measurement."""
    return q.is_cuda or q.dtype != torch.bfloat16 or q.shape[1] >= 4 * k.shape[1] or not has_amx()


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """The only query of all heads (B, H, 1, E), as H / K queries of each head of k, which is then not repeated."""
    return q.reshape(len(q), k.shape[1], -1, q.shape[3])


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with a head for each of q's."""
    groups = q.shape[1] // k.shape[1]
    return (k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)) if groups > 1 else (k, v)


def _attend_to_equal(q: Tensor, k: Tensor, v: Tensor, samples: int) -> Tensor:
    """Samples of one length are a batch: one call, and its output is kept once."""
    H, N, E = q.shape[1:]
    q, k, v = (x.transpose(1, 2).reshape(samples, N // samples, -1, E).transpose(1, 2) for x in (q, k, v))
    o = _attend(q, k, v)  # (samples, H, N / samples, E)
    return o.transpose(1, 2).reshape(1, N, H, E).transpose(1, 2)


def _attend_to_ragged(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Samples of several lengths in one call of a GPU's FlashAttention."""
    varlen_attn, causal = _varlen()
    k, v = _repeated(q, k, v)
    q, k, v = (x.squeeze(0).transpose(0, 1).contiguous() for x in (q, k, v))  # (N, H, E)
    longest = max(documents.lengths)
    out: Tensor = varlen_attn(q, k, v, documents.bounds, documents.bounds, longest, longest, **causal)
    return out.transpose(0, 1)[None]  # (1, H, N, E)


@functools.cache
def _varlen() -> tuple[Any, dict[str, Any]]:
    """torch's function, imported where it is needed, and causality as this release of torch wants it asked for."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return varlen_attn, {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
