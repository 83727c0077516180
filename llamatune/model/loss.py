"""The loss of next-token prediction, summed, with no logit that no label needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model.attention import Documents
from llamatune.model.transformer import Transformer, widened

IGNORED = -100
"""The label of a position that is no target."""

_CHUNK_LOGITS = 1 << 25
"""Logits held at once: 128 MiB in fp32, 1,024 rows of LLaMA-2's vocabulary."""


def summed_loss(
    model: Transformer, input_ids: Tensor, labels: Tensor, lengths: tuple[int, ...] | None = None
) -> Tensor:
    """Cross-entropy summed over the target tokens, a scalar in fp32 or wider.

    ``labels``, on the CPU and shaped like ``input_ids``, hold the id at their own position or -100: position t-1
    predicts label t. The caller divides by the target tokens of the whole optimizer step, so that no split of its rows
    into micro-batches or ranks changes the gradient.

    Args:
        lengths: ``input_ids`` is one row (1, N) of samples of these lengths; None: each of its rows is one sample.
    """
    lengths = lengths or (input_ids.shape[1],) * len(input_ids)
    device = model.device
    # Found on the CPU, where the labels are: asking the device which positions count would stall it.
    next_labels = labels.reshape(-1).roll(-1)
    next_labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORED  # a sample's last token predicts nothing
    predicting = (next_labels != IGNORED).nonzero().squeeze(1)  # (P,) of N
    targets = next_labels[predicting].to(device, non_blocking=True)
    hidden = model.hidden_states(
        input_ids.reshape(1, -1).to(device, non_blocking=True),
        documents=Documents.of(lengths, device),
        rows=predicting.to(device, non_blocking=True),
    )[0]  # (P, D)
    weight = model.head_weight
    if weight.requires_grad:
        return F.cross_entropy(widened(model.head(hidden)), targets, reduction="sum")
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else hidden.dtype
    return _FrozenHeadLoss.apply(hidden, weight, targets, dtype)  # type: ignore[no-any-return, no-untyped-call]


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy behind a frozen head, a chunk of logits at a time.

    The gradient with respect to the hidden states, (softmax(logits) - onehot) W, is made in the forward pass while a
    chunk's logits are at hand, so none of them is kept or made twice (as in Liger Kernel's fused linear cross-entropy).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            W = weight.to(dtype)  # (V, D)
            wants_gradient = ctx.needs_input_grad[0]
            gradient = torch.empty_like(hidden) if wants_gradient else None  # (P, D)
            total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
            step = max(1, _CHUNK_LOGITS // len(W))
            for start in range(0, len(hidden), step):
                part = slice(start, start + step)
                logits = widened(hidden[part].to(dtype) @ W.T)  # (chunk, V)
                chosen = targets[part, None]
                logits.sub_(logits.amax(-1, keepdim=True))
                wanted = logits.gather(1, chosen)
                share = logits.exp_().sum(-1, keepdim=True)
                total += (share.log() - wanted).sum()
                if gradient is not None:
                    logits.div_(share).scatter_add_(1, chosen, torch.full_like(share, -1.0))
                    gradient[part] = logits.to(dtype) @ W
            ctx.save_for_backward(gradient)
            return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None
