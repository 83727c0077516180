"""Causal attention of bf16 tensors computed in fp32, for short samples on a CPU; what is kept for gradients is in bf16.

There the fp32 kernel is quicker than the one in bf16, which compiles code for every new length of a sample.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CPU_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""torch's FlashAttention on a CPU in any precision, which returns the logarithms of the softmaxes' sums, too."""
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

NAME = "llamatune::attention_in_fp32"
"""The operator that returns the output (B, H, T, E) in q's dtype, and the log of each softmax's sum in fp32."""

_library = torch.library.Library("llamatune", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("attention_in_fp32(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]


def _forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    o, log_sums = CPU_KERNEL(q.float(), k.float(), v.float(), 0.0, True)
    return o.to(q.dtype), log_sums


for _key in ("CPU", "Meta"):
    _library.impl("attention_in_fp32", _forward, _key)  # type: ignore[no-untyped-call]


class _AttentionInFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, log_sums = torch.ops.llamatune.attention_in_fp32(q, k, v)
        ctx.save_for_backward(q, k, v, o, log_sums)
        return o  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        *tensors, log_sums = ctx.saved_tensors
        wide = (x.float() for x in (*grad_outputs, *tensors))
        gradients = _KERNEL_BACKWARD(*wide, log_sums, 0.0, True)
        return tuple(gradient.to(tensors[0].dtype) for gradient in gradients)


def attend_in_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(E)) v, causal; (B, H, T, E) from q of that shape and k, v (B, K, T, E), all of one dtype."""
    if torch.is_inference_mode_enabled():
        return _forward(q, k, v)[0]
    return _AttentionInFp32.apply(q, k, v)  # type: ignore[no-any-return, no-untyped-call]
