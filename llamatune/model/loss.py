"""Cross-entropy of next-token prediction, summed over target tokens; only logits that predict a target are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model.compiled_functions import compilable
from llamatune.model.layers import linear, product_dtype, widened
from llamatune.model.transformer import Transformer
from llamatune.shapes.tile_sizes import LOGITS_AT_ONCE

IGNORED = -100
"""The label of a position that is no target."""


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

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if weight.requires_grad:
            return F.cross_entropy(widened(linear(hidden, weight)), targets, reduction="sum")
        return _FrozenHeadLoss.apply(hidden, weight, targets)  # type: ignore[no-any-return, no-untyped-call]

    lengths = lengths or (input_ids.shape[1],) * len(input_ids)
    summed, _ = _of_predictions(model, input_ids, labels, lengths, loss)
    return summed  # type: ignore[no-any-return]


@torch.no_grad()
def target_losses(
    model: Transformer, input_ids: Tensor, labels: Tensor, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target token, (N,) fp64 in nats, and whether it was the likeliest, (N,) bool; on the CPU.

    The arguments are those of ``summed_loss``. Where a token is no target, both are zero.
    """

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        W, step = weight.to(product_dtype(hidden)), _chunk_rows(weight)
        losses = torch.zeros(len(targets), dtype=torch.float64)
        correct = torch.zeros(len(targets), dtype=torch.bool)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            with torch.autocast(hidden.device.type, enabled=False):
                logits = widened(hidden[part].to(W.dtype) @ W.T)  # (chunk, V)
            losses[part] = F.cross_entropy(logits, targets[part], reduction="none").double().cpu()
            correct[part] = (logits.argmax(-1) == targets[part]).cpu()
        return losses, correct

    (found_losses, found_correct), predicting = _of_predictions(model, input_ids, labels, lengths, loss)
    losses = torch.zeros(labels.numel(), dtype=torch.float64)
    correct = torch.zeros(labels.numel(), dtype=torch.bool)
    losses[predicting + 1], correct[predicting + 1] = found_losses, found_correct
    return losses, correct


def _of_predictions(
    model: Transformer,
    input_ids: Tensor,
    labels: Tensor,
    lengths: tuple[int, ...],
    loss: Callable[[Tensor, Tensor, Tensor], Any],
) -> tuple[Any, Tensor]:
    """``loss`` of the states (P, D) that predict a target, the head's weight and the targets (P,).

    Also returns the states' places in the row (P,), on the CPU.
    """
    device = model.device
    # The positions are computed on the CPU, where the labels are: reading them from the device would stall it.
    next_labels = labels.reshape(-1).roll(-1)
    next_labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORED  # a sample's last token predicts nothing
    predicting = (next_labels != IGNORED).nonzero().squeeze(1)  # (P,) of N
    targets = next_labels[predicting].to(device, non_blocking=True)
    del next_labels  # not needed at the peak
    result = model(
        input_ids.reshape(1, -1).to(device, non_blocking=True),
        lengths=lengths,
        rows=predicting.to(device, non_blocking=True),
        read=lambda hidden, weight: loss(hidden[0], weight, targets),
    )
    return result, predicting


def _chunk_rows(head_weight: Tensor) -> int:
    return max(1, LOGITS_AT_ONCE[head_weight.device.type] // len(head_weight))


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy behind a frozen head, a chunk of logits at a time.

    The gradient with respect to the hidden states, (softmax(logits) - onehot) W, is made in the forward pass while a
    chunk's logits are at hand, so none of them is kept or made twice (as in Liger Kernel's fused linear cross-entropy).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        dtype = product_dtype(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            W = weight.to(dtype)  # (V, D)
            wants_gradient = ctx.needs_input_grad[0]
            gradient = torch.empty_like(hidden) if wants_gradient else None  # (P, D)
            total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
            step = _chunk_rows(W)
            for start in range(0, len(hidden), step):
                part = slice(start, start + step)
                logits = hidden[part].to(dtype) @ W.T  # (chunk, V)
                total += _cross_entropy(logits, targets[part, None], wants_gradient)
                if gradient is not None:
                    gradient[part] = logits @ W
                del logits  # before the next chunk's are made
            ctx.save_for_backward(gradient)
            return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None


@compilable
def _cross_entropy(logits: Tensor, targets: Tensor, wants_slope: bool) -> Tensor:
    """The summed loss in fp32 or wider; its derivative, softmax(logits) - onehot, takes the logits' place.

    ``logits`` (P, V), ``targets`` (P, 1).
    """
    wide = widened(logits)
    wide.sub_(wide.amax(-1, keepdim=True))
    wanted = wide.gather(1, targets)
    total = wide.exp_().sum(-1, keepdim=True)
    if wants_slope:
        logits.copy_(wide.div_(total)).scatter_(1, targets, (wanted.exp() / total - 1).to(logits.dtype))
    return (total.log() - wanted).sum()
