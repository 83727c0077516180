"""The loss of next-token prediction, summed."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from llamatune.model.transformer import Transformer, widened

IGNORED = -100
"""The label of a position that is no target."""


def summed_loss(model: Transformer, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the target tokens, a scalar in fp32 or wider; no logit is made elsewhere.

    ``labels`` (B, T), on the CPU, hold the id at their own position or -100: position t-1 predicts label t. The caller
    divides by the target tokens of the whole optimizer step, so that no split of its rows into micro-batches or ranks
    changes the gradient.
    """
    # Found on the CPU, where the labels are: asking the device which positions count would stall it.
    next_labels = labels[:, 1:].reshape(-1)
    positions = (next_labels != IGNORED).nonzero().squeeze(1)  # (N,) among the B * (T-1) predicting positions
    targets = next_labels[positions].to(model.device, non_blocking=True)
    hidden = model.hidden_states(input_ids.to(model.device, non_blocking=True))[:, :-1]  # (B, T-1, D)
    predicting = hidden.reshape(-1, hidden.shape[-1])[positions.to(model.device, non_blocking=True)]  # (N, D)
    return F.cross_entropy(widened(model.head(predicting)), targets, reduction="sum")
