"""Activation checkpointing (Chen et al. 2016), and the memory that was really used."""

from __future__ import annotations

import resource
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llamatune.model.fused import Recompute, apply_fused
from llamatune.model.transformer import Block, Transformer


def recompute(function: Any, *args: Any) -> Tensor:
    """Run a part of a block keeping its inputs only; backward runs it again, with the same dropout.

    Non-reentrant: the reentrant kind gives no gradient, or a part of it, when the block's input needs none.
    """
    return checkpoint(function, *args, use_reentrant=False)  # type: ignore[no-any-return]


def apply_activation_checkpointing(model: Transformer, mode: str, fused: bool) -> None:
    """Choose what is recomputed: ``none``, ``block``, ``every_N`` (each N-th block), ``attention``, ``feed_forward``,
    or ``sublayer`` (attention and feed-forward each on its own, norm included); ``fused``: by the functions of a LoRA
    block that recompute no more than their gradients need."""
    for index, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        whole = mode == "block" or (mode.startswith("every_") and (index + 1) % int(mode.removeprefix("every_")) == 0)
        feed_forward = mode in ("feed_forward", "sublayer")
        if fused:
            partly = Recompute.FEED_FORWARD if feed_forward else Recompute.NOTHING
            apply_fused(block, Recompute.BLOCK if whole else partly)
        elif whole:
            block.run_block = recompute
        elif feed_forward:
            block.run_feed_forward = recompute
        if mode in ("attention", "sublayer"):
            block.run_attention = recompute


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA's largest allocation on ``device``; on the CPU the process's peak resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_reserved_bytes(device: torch.device) -> int | None:
    """What CUDA's allocator held at most, freed blocks included; None on the CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
