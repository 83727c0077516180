"""Trained tensors in the dtype of products, cast once for all passes of an accumulation window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from llamatune.model.adapters.adapted_linear import AdaptedLinear
from llamatune.model.fused.block import FusedBlock
from llamatune.model.products import at_once


@contextlib.contextmanager
def cast_for_window(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Keep what fused blocks train in ``dtype`` too, within the block, where no trained tensor may change.

    On a GPU alone, where it saves a launch for each tensor, pass and tile. A CPU casts as it goes and keeps nothing.
    """
    blocks = [block for block in model.modules() if isinstance(block, FusedBlock)]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, AdaptedLinear)]
    trained = [tensor.detach() for layer in layers for tensor in layer.trained if tensor.dtype != dtype]
    if not trained or not at_once(trained[0]):
        yield
        return
    sizes = [tensor.numel() for tensor in trained]
    flat = torch.empty(sum(sizes), dtype=dtype, device=trained[0].device)
    casts = [part.view(x.shape) for part, x in zip(torch.split(flat, sizes), trained, strict=True)]
    torch._foreach_copy_(casts, trained)
    left = iter(casts)
    try:
        for layer in layers:
            layer.casts = tuple(next(left) for _ in layer.trained)
        yield
    finally:
        for layer in layers:
            layer.casts = ()
