"""Logits of the next token: of the last position of each sequence, or of the rows that a pass reads."""

from __future__ import annotations

import torch
from torch import Tensor

from llamatune.model.layers import linear
from llamatune.shapes.tile_sizes import HEAD_WEIGHTS_OF_A_THREAD


def last_logits(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """Logits of the last position alone, (B, T, D) -> (B, V); they may lie in memory column after column."""
    return _logits(hidden[:, -1], head_weight)


def logits_of_the_row(hidden: Tensor, head_weight: Tensor) -> Tensor:
    """(1, rows, D) -> (rows, V); they may lie in memory column after column."""
    return _logits(hidden[0], head_weight)


def _logits(x: Tensor, W: Tensor) -> Tensor:
    """x W^T, (rows, D) -> (rows, V); of several rows in fp32 by portions of V, since MKL copies what it reads of W."""
    if len(x) == 1 or not _suits_portions(x, W):
        return linear(x, W, any_layout=True)
    logits = x.new_empty(len(x), len(W))
    portion = max(1, HEAD_WEIGHTS_OF_A_THREAD * torch.get_num_threads() // W.shape[1])
    for part, out in zip(torch.split(W, portion), torch.split(logits, portion, dim=1), strict=True):
        torch.mm(x, part.T, out=out)
    return logits


def _suits_portions(x: Tensor, W: Tensor) -> bool:
    """Whether products can be written to parts of a tensor, without autograd and autocast, and MKL computes them."""
    is_plain = torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
    return is_plain and x.device.type == "cpu" and x.dtype == W.dtype == torch.float32
