"""Which kernel torch would take for a call of scaled_dot_product_attention on a GPU.

The rules are those of ``sdp_utils.cpp`` in torch 2.11 to 2.14, as far as calls of the package meet them. They judge
``llamatune.shapes.attention_kernels``, and so are written apart from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SIXTEEN_BITS = (torch.float16, torch.bfloat16)


def kernel_of(
    capability: tuple[int, int], q: Tensor, k: Tensor, mask: Tensor | None, enable_gqa: bool, cudnn: bool
) -> str:
    """``cudnn``, ``flash``, ``efficient`` or ``math``; math keeps every score for the backward pass."""
    head, grouped, sixteen_bits = q.shape[-1], q.shape[1] != k.shape[1], q.dtype in SIXTEEN_BITS
    if cudnn and capability[0] in (9, 10) and sixteen_bits and head <= 128 and head % 8 == 0:
        return "cudnn"
    if capability >= (8, 0) and sixteen_bits and head <= 256 and mask is None:
        return "flash"
    runs = q.dtype == torch.float32 or q.dtype == torch.float16 or (q.dtype == torch.bfloat16 and capability >= (8, 0))
    if runs and head % (4 if q.dtype == torch.float32 else 8) == 0 and not (grouped and enable_gqa):
        return "efficient"
    return "math"


class Recorder:
    """Notes the kernel of each call that is made while it is entered, as ``kernel_of`` tells it."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.capability, self.kernels = capability, set[str]()

    def __enter__(self) -> Recorder:
        self._attention = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._noted
        return self

    def __exit__(self, *_: object) -> None:
        F.scaled_dot_product_attention = self._attention

    def _noted(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        mask, grouped = options.get("attn_mask"), options.get("enable_gqa", False)
        self.kernels.add(kernel_of(self.capability, q, k, mask, grouped, cudnn))
        return self._attention(q, k, v, **options)
