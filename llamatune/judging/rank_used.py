"""How much of its rank an adapter uses: singular values of the update of each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamatune.checkpoints.adapter import Adapter

_SHARE = 0.99


@dataclass(frozen=True)
class LayerRank:
    """One adapted matrix: the singular values of scaling · B A, largest first.

    ``effective_rank`` is exp of the entropy of their shares in their sum (Roy and Vetterli 2007), 0 of no update;
    ``rank_99`` how many hold 99 % of the update's squared norm.
    """

    name: str
    r: int
    singular_values: tuple[float, ...]
    effective_rank: float
    rank_99: int

    @property
    def layer(self) -> int:
        return int(self.name.split(".")[2])

    @property
    def module(self) -> str:
        return self.name.split(".")[-1]


@dataclass(frozen=True)
class RankUse:
    """Of all adapted matrices. ``mean_effective_rank`` is their mean, ``mean_share`` that of effective rank / r."""

    mean_effective_rank: float
    mean_share: float
    layers: tuple[LayerRank, ...]


def rank_use(adapter: Adapter) -> RankUse | None:
    """None for an adapter without low-rank updates of blocks."""
    stems = [name.removesuffix(".lora_A.weight") for name in adapter.tensors if name.endswith(".lora_A.weight")]
    layers = tuple(_layer_rank(adapter, stem) for stem in sorted(stems, key=_order))
    if not layers:
        return None
    count = len(layers)
    mean = math.fsum(layer.effective_rank for layer in layers) / count
    return RankUse(mean, math.fsum(layer.effective_rank / layer.r for layer in layers) / count, layers)


def _order(stem: str) -> tuple[int, str]:
    return int(stem.split(".")[2]), stem


def _layer_rank(adapter: Adapter, stem: str) -> LayerRank:
    A, B = adapter.tensors[f"{stem}.lora_A.weight"], adapter.tensors[f"{stem}.lora_B.weight"]
    values = (singular_values(A, B) * abs(adapter.scaling(f"{stem}.weight"))).tolist()
    return LayerRank(stem, len(A), tuple(values), effective_rank(values), _rank_99(values))


def singular_values(A: Tensor, B: Tensor) -> Tensor:
    """Those of B A (out, in), from A (R, in) and B (out, R); (min(R, out, in),) fp64, largest first.

    With B = Q S and A^T = P T they are those of S T^T, which is R x R: the product itself is not made.
    """
    S = torch.linalg.qr(B.double(), mode="r").R  # (min(out, R), R)
    T = torch.linalg.qr(A.double().T, mode="r").R  # (min(in, R), R)
    values: Tensor = torch.linalg.svdvals(S @ T.T)
    return values


def effective_rank(values: Sequence[float]) -> float:
    """exp of the Shannon entropy of the values' shares in their sum; 0 if all are 0."""
    total = math.fsum(values)
    if total == 0:
        return 0.0
    return math.exp(-math.fsum(value / total * math.log(value / total) for value in values if value > 0))


def _rank_99(values: Sequence[float]) -> int:
    total, held = math.fsum(value**2 for value in values), 0.0
    for number, value in enumerate(values, start=1):
        held += value**2
        if held >= _SHARE * total:
            return number if total else 0
    return len(values)
