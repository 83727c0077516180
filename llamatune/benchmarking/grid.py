"""The benchmark's grid: preset grids, which values are compared, and how a value reads as a switch. No torch."""

from __future__ import annotations

import itertools

from llamatune.errors import SpecError
from llamatune.spec_grid import BATCH, LORA, Axis, Grid, batch_sizes

_OFF = {
    LORA: "off",
    "training.precision": "fp32",
    "training.gradient_accumulation_steps": "1",
    "training.activation_checkpointing": "none",
    "training.fused": "false",
    "training.compile": "false",
    "data.packing": "false",
}


def comparisons(axis: Axis) -> list[tuple[str, str]]:
    """Pairs of an axis's values, without a technique and with it.

    Accumulation is compared at equal micro-batch and at equal global batch.
    """
    if axis.key != BATCH:
        return [(axis.values[0], value) for value in axis.values[1:]]
    pairs = itertools.permutations([(value, *batch_sizes(value)) for value in axis.values], 2)
    return [
        (off, on)
        for (off, micro, single), (on, micro_on, accumulated) in pairs
        if single == 1 < accumulated and micro in (micro_on, micro_on * accumulated)
    ]


def switch(axis: Axis, value: str) -> str:
    """``OFF``, ``ON`` or ``ON value``; the value alone if the axis has no off value."""
    if axis.key == BATCH:
        return f"{'OFF' if value.endswith('x1') else 'ON'} {value}"
    if axis.key not in _OFF:
        return value
    if value == _OFF[axis.key]:
        return "OFF"
    return "ON" if value in ("on", "true") else f"ON {value}"


def preset_grid(name: str, cuda: bool) -> Grid:
    """A grid by name. On a CPU it has no fp16, whose products take a hundred times longer there."""
    checkpointing = "training.activation_checkpointing"
    if name == "techniques":
        precisions = ("fp32", "bf16", "fp16") if cuda else ("fp32", "bf16")
        axes = (
            Axis(LORA, ("off", "on")),
            Axis("training.precision", precisions),
            Axis(BATCH, ("1x1", "8x1", "1x8")),
            Axis(checkpointing, ("none", "every_2", "block")),
        )
        return Grid(axes, ("model.dtype=float32",))
    if name == "checkpointing":
        modes = ("none", "attention", "feed_forward", "sublayer", "projections", "block", "every_2", "every_3")
        return Grid((Axis(checkpointing, modes),))
    raise SpecError(f"unknown grid {name!r}", "--preset-grid", "there are techniques and checkpointing")
