"""Recompute levels of activation checkpointing: its modes, and what a block computes again in the backward pass.

``training.activation_checkpointing`` is parsed here and nowhere else.
"""

from __future__ import annotations

import enum
import re

from llamatune.shapes.llama_config import ATTENTION_MODULES, GATE_UP_MODULES, QKV_MODULES

MODES = ("none", "block", "every_2 ... every_N", "attention", "feed_forward", "sublayer", "projections")
"""What ``training.activation_checkpointing`` may be."""
ATTENTION_MODES, FEED_FORWARD_MODES = ("attention", "sublayer"), ("feed_forward", "sublayer")
"""The modes that compute the attention half, or the feed-forward half, again as a whole, norm included."""


class Recompute(enum.IntEnum):
    """What a fused block computes again in the backward pass, beside its norms.

    In brackets: what is kept for the backward pass, per token and layer of LLaMA-2-7B in 16 bits.
    """

    NOTHING = 0  # 92 KiB
    FEED_FORWARD = 1  # 49 KiB
    PROJECTIONS = 2  # 24 KiB
    BLOCK = 3  # 8 KiB

    @property
    def label(self) -> str:
        """What is computed again, in words."""
        return ("nothing", "gate and up", "q, k, v, gate and up", "the whole block")[self]

    @property
    def modules(self) -> tuple[str, ...]:
        """The linear layers whose products are computed again."""
        all_but_down = (*ATTENTION_MODULES, *GATE_UP_MODULES)
        return ((), GATE_UP_MODULES, (*QKV_MODULES, *GATE_UP_MODULES), all_but_down)[self]


Levels = tuple[Recompute, ...]
"""A level for each block, the first block first."""


def is_mode(text: str) -> bool:
    """Whether ``text`` is one of ``MODES``."""
    return (text in MODES and " " not in text) or re.fullmatch(r"every_([2-9]|[1-9]\d{1,2})", text) is not None


def is_whole(mode: str, layer: int) -> bool:
    """Whether ``mode`` computes this whole block again: ``block``, or each N-th block under ``every_N``."""
    return mode == "block" or (mode.startswith("every_") and (layer + 1) % period_of(mode) == 0)


def period_of(mode: str) -> int:
    """After how many blocks ``mode`` repeats itself: N of ``every_N``, else 1."""
    return int(mode.removeprefix("every_")) if mode.startswith("every_") else 1


def levels_of(mode: str, layers: int) -> Levels:
    """The level of each fused block under ``mode``."""
    level = Recompute.NOTHING
    if mode in FEED_FORWARD_MODES:
        level = Recompute.FEED_FORWARD
    elif mode == "projections":
        level = Recompute.PROJECTIONS
    return tuple(Recompute.BLOCK if is_whole(mode, layer) else level for layer in range(layers))
