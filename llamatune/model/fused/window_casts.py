"""Trained tensors in the dtype of products, and what is derived from them, once for all passes of a window."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from llamatune.model.adapters.adapted_linear import AdaptedLinear
from llamatune.model.fused.block import FusedBlock
from llamatune.model.products import at_once


@contextlib.contextmanager
def cast_for_window(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Keep what kinds of adapter derive from their tensors, within the block, where no trained tensor may change.

    On a GPU keep the tensors of fused blocks in ``dtype`` too: it saves a launch for each tensor, pass and tile. A CPU
    casts as it goes.
    """
    adapted = [layer for layer in model.modules() if isinstance(layer, AdaptedLinear)]
    blocks = [block for block in model.modules() if isinstance(block, FusedBlock)]
    inside = [layer for block in blocks for layer in block.modules() if isinstance(layer, AdaptedLinear)]
    try:
        for layer in adapted:
            layer.window = {}
        _cast([layer for layer in inside if layer.casts_for_window], dtype)
        yield
    finally:
        for layer in adapted:
            layer.window, layer.casts = None, ()


def _cast(layers: Sequence[AdaptedLinear], dtype: torch.dtype) -> None:
    trained = [tensor.detach() for layer in layers for tensor in layer.tensors if tensor.dtype != dtype]
    if not trained or not at_once(trained[0]):
        return
    sizes = [tensor.numel() for tensor in trained]
    flat = torch.empty(sum(sizes), dtype=dtype, device=trained[0].device)
    casts = [part.view(x.shape) for part, x in zip(torch.split(flat, sizes), trained, strict=True)]
    torch._foreach_copy_(casts, trained)
    left = iter(casts)
    for layer in layers:
        layer.casts = tuple(next(left) for _ in layer.tensors)
