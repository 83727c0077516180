"""Cross-entropy of next-token prediction, summed over target tokens; only logits that predict a target are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llamatune.model.compiled_functions import compilable
from llamatune.model.kernels.choice import by_kernel
from llamatune.model.layers import linear, product_dtype, widened
from llamatune.model.transformer import Transformer
from llamatune.shapes.recurring_sizes import filled_up, logit_rows
from llamatune.shapes.tile_sizes import wide_logit_rows

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
            of_all = F.pad(targets, (0, len(hidden) - len(targets)), value=IGNORED)
            return F.cross_entropy(widened(linear(hidden, weight)), of_all, reduction="sum")
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

    (found_losses, found_correct), predicting = _of_predictions(model, input_ids, labels, lengths, _losses_of_targets)
    losses = torch.zeros(labels.numel(), dtype=torch.float64)
    correct = torch.zeros(labels.numel(), dtype=torch.bool)
    losses[predicting + 1], correct[predicting + 1] = found_losses, found_correct
    return losses, correct


@torch.no_grad()
def next_token_losses(
    model: Transformer, input_ids: Tensor, lengths: tuple[int, ...], positions: Tensor, targets: Tensor
) -> Tensor:
    """Cross-entropy of each of ``targets`` (P,) as the token behind ``positions`` (P,); (P,) fp64 in nats, on the CPU.

    ``input_ids`` (1, N) are samples of these lengths. A position may be asked for several targets.
    """
    losses, _ = _at_positions(model, input_ids, lengths, positions, targets, _losses_of_targets)
    return losses  # type: ignore[no-any-return]


def _losses_of_targets(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each target (P,), fp64, and whether it was the likeliest, bool; both on the CPU."""
    W = weight.to(product_dtype(hidden))
    found = torch.zeros(2, len(targets), dtype=torch.float64, device=hidden.device)
    for chunk in _chunks(len(hidden), W):
        with torch.autocast(hidden.device.type, enabled=False):
            logits, chunk_targets = hidden[chunk].to(W.dtype) @ W.T, targets[chunk]  # (chunk, V)
        for piece in _pieces(len(chunk_targets), W):
            found[0, chunk][piece], found[1, chunk][piece] = token_losses(logits[piece], chunk_targets[piece])
    losses, correct = found.cpu()  # the device is waited for here, once a batch
    return losses, correct.bool()


def _of_predictions(
    model: Transformer,
    input_ids: Tensor,
    labels: Tensor,
    lengths: tuple[int, ...],
    loss: Callable[[Tensor, Tensor, Tensor], Any],
) -> tuple[Any, Tensor]:
    """``loss`` of the states (P or more, D) that predict a target, the head's weight and the targets (P,).

    Also returns the states' places in the row (P,), on the CPU.
    """
    # The positions are computed on the CPU, where the labels are: reading them from the device would stall it.
    next_labels = labels.reshape(-1).roll(-1)
    next_labels[torch.tensor(lengths).cumsum(0) - 1] = IGNORED  # a sample's last token predicts nothing
    predicting = (next_labels != IGNORED).nonzero().squeeze(1)  # (P,) of N
    targets = next_labels[predicting]
    del next_labels  # not needed at the peak
    return _at_positions(model, input_ids, lengths, predicting, targets, loss), predicting


def _at_positions(
    model: Transformer,
    input_ids: Tensor,
    lengths: tuple[int, ...],
    positions: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Any],
) -> Any:
    """``loss`` of the states at ``positions`` (P or more, D), the head's weight and ``targets`` (P,).

    So that the shapes of products recur on a CPU, a sample without targets fills up the row, and states of its first
    position those that predict.
    """
    device, element_bytes = model.device, model.product_dtype.itemsize
    targets = targets.to(device, non_blocking=True)
    row = input_ids.reshape(1, -1)
    if filling := filled_up(row.shape[1], device.type, element_bytes) - row.shape[1]:
        row, lengths = F.pad(row, (0, filling)), (*lengths, filling)
    rows = F.pad(positions, (0, filled_up(len(positions), device.type, element_bytes) - len(positions)))
    return model(
        row.to(device, non_blocking=True),
        lengths=lengths,
        rows=rows.to(device, non_blocking=True),
        read=lambda hidden, weight: loss(hidden.squeeze(0), weight, targets),
    )


def _chunks(rows: int, head_weight: Tensor) -> Iterator[slice]:
    """The rows whose logits are in flight together."""
    return _slices(rows, logit_rows(len(head_weight), head_weight.device.type, head_weight.element_size()))


def _pieces(rows: int, head_weight: Tensor) -> Iterator[slice]:
    """The rows of a chunk whose loss is computed together."""
    return _slices(rows, wide_logit_rows(len(head_weight), head_weight.device.type))


def _slices(rows: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


class _FrozenHeadLoss(torch.autograd.Function):
    """Summed cross-entropy behind a frozen head, a chunk of logits at a time; states without a target come last.

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
            for chunk in _chunks(len(hidden), W):
                logits, wanted = hidden[chunk].to(dtype) @ W.T, targets[chunk, None]  # (chunk, V)
                for piece in _pieces(len(wanted), W):
                    total += summed_cross_entropy(logits[piece], wanted[piece], wants_gradient)
                if gradient is not None:
                    logits[len(wanted) :] = 0
                    if gradient.dtype == dtype:
                        torch.mm(logits, W, out=gradient[chunk])
                    else:
                        gradient[chunk] = logits @ W
                del logits  # before the next chunk's are made
            ctx.save_for_backward(gradient)
            return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None


@by_kernel("cross_entropy")
@compilable
def summed_cross_entropy(logits: Tensor, targets: Tensor, wants_slope: bool) -> Tensor:
    """The summed loss in fp32 or wider; its derivative, softmax(logits) - onehot, takes the logits' place.

    ``logits`` (P, V), ``targets`` (P, 1).
    """
    wide = widened(logits)
    wide.sub_(wide.amax(-1, keepdim=True))
    wanted = wide.gather(1, targets)
    total = wide.exp_().sum(-1, keepdim=True)
    if wants_slope:
        logits.copy_(wide.div_(total))
        # scatter_ would copy all of ``logits`` to fp32 and back.
        rows = torch.arange(len(logits), device=logits.device)[:, None]
        logits.index_put_((rows, targets), (wanted.exp() / total - 1).to(logits.dtype))
    return (total.log() - wanted).sum()


@by_kernel("cross_entropy")
def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of each row (P,), fp32 or wider, and whether its target (P,) was the likeliest, bool."""
    wide = widened(logits)
    return F.cross_entropy(wide, targets, reduction="none"), wide.argmax(-1) == targets
