"""A merged layer: an adapted one as a plain matrix with the update in it, and how much of that rounding left."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from llamatune.model.adapters.adapted_linear import AdaptedLinear
from llamatune.model.layers import Linear

_WEIGHTS_AT_ONCE = 1 << 22
"""Whose fp32 values are held at a time."""


@dataclass(frozen=True)
class Survival:
    """Of an update: its squared norm, and the product of it with what rounding left of it."""

    squared_norm: float = 0.0
    product: float = 0.0

    @property
    def share(self) -> float:
        """What is left in the update's own direction; not finite where a weight is not. All is left of an empty one."""
        return self.product / self.squared_norm if self.squared_norm else 1.0

    def __add__(self, other: Survival) -> Survival:
        return Survival(self.squared_norm + other.squared_norm, self.product + other.product)


@torch.no_grad()
def merged_layer(layer: AdaptedLinear) -> tuple[Linear, Survival]:
    """The layer without its adapter beside it: the sum in fp32, rounded once to the dtype of its weight."""
    assert layer.quantized is None, "codes are not merged into"
    W = layer.weight
    made, sums = torch.empty_like(W), torch.zeros(2, dtype=torch.float64, device=W.device)
    step = max(1, _WEIGHTS_AT_ONCE // W.shape[1])
    for first in range(0, len(W), step):
        rows = slice(first, first + step)
        before = W[rows].float()
        update = layer.merged(W[rows], layer.tensors, layer.scaling, rows)
        made[rows] = update
        update -= before
        left = made[rows] - before
        sums += torch.stack([(update * update).sum(), (update * left).sum()])
    squared_norm, product = sums.tolist()
    with torch.device("meta"):
        merged = Linear(layer.in_features, layer.out_features)
    merged.weight = nn.Parameter(made, requires_grad=False)
    merged.register_parameter("bias", layer.bias)
    return merged, Survival(squared_norm, product)
