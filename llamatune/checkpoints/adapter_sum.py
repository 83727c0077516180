"""Several adapters as one: the weighted sum of their updates, exact, by ranks laid side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llamatune.checkpoints.adapter import Adapter, load_adapter
from llamatune.errors import CheckpointError, SpecError
from llamatune.shapes.adapter import ADAPTER_KINDS, AdapterSpec

_SUMMED = ADAPTER_KINDS["lora"].tensors.keys()


def load_adapters(paths: Sequence[Path]) -> list[Adapter]:
    """The adapters in these directories, which are not yet checked against a base.

    Raises:
        SpecError: two are the same.
        CheckpointError: as of ``load_adapter``.
    """
    adapters = [load_adapter(path) for path in paths]
    for number, adapter in enumerate(adapters):
        if (adapter.digest, adapter.facts()) in [(before.digest, before.facts()) for before in adapters[:number]]:
            todo = "give it once, with the sum of its weights"
            raise SpecError("the same adapter is given twice", adapter.path, todo)
    return adapters


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The adapter whose update is the sum of those of ``adapters``, each times its weight; one of weight 1 is itself.

    Of A and B of each adapter, sum of weight · scaling · B A is [weight · scaling · B, ...] [A; ...], of the sum of the
    ranks.

    Raises:
        CheckpointError: an adapter changes the base by more than adding A and B's product.
    """
    if len(adapters) == 1 and weights[0] == 1:
        return adapters[0]
    for adapter in adapters:
        _refuse_unsummable(adapter)
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, A in adapter.tensors.items():
            if name.endswith(".lora_A.weight"):
                stem = name.removesuffix(".lora_A.weight")
                B = adapter.tensors[f"{stem}.lora_B.weight"]
                parts.setdefault(stem, []).append((A, B * (weight * adapter.scaling(f"{stem}.weight"))))
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for stem, factors in parts.items():
        A, B = (torch.cat(side, axis) for axis, side in enumerate(zip(*factors, strict=True)))
        tensors |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
        ranks[stem.removeprefix("model.")] = len(A)
    r = max(ranks.values())
    others = tuple((path, rank) for path, rank in ranks.items() if rank != r)
    alphas = tuple((path, float(rank)) for path, rank in others)
    spec = AdapterSpec(r, float(r), target_modules=tuple(ranks), module_ranks=others, module_alphas=alphas)
    first = adapters[0]
    return Adapter(spec, tensors, first.base_fingerprint, base_path=first.base_path, path=first.path)


def template_holder(adapters: Sequence[Adapter]) -> Adapter:
    """The first adapter with a template, or without one if there is none.

    Raises:
        CheckpointError: another has another template.
    """
    holders = [adapter for adapter in adapters if adapter.template is not None]
    for adapter in holders:
        if adapter.template != holders[0].template:
            what = f"was trained with another template than {holders[0].path}"
            raise CheckpointError(what, adapter.path, "choose one with --template")
    return [*holders, *adapters][0]


def facts_of(adapters: Sequence[Adapter], weights: Sequence[float]) -> list[dict[str, Any]]:
    """Which adapters they are, and what is computed with them, as JSON."""
    return [
        {"sha256": adapter.digest, "weight": weight, "config": adapter.facts()}
        for adapter, weight in zip(adapters, weights, strict=True)
    ]


def _refuse_unsummable(adapter: Adapter) -> None:
    what = None
    if adapter.base_changes:
        what = f"it changes {next(iter(adapter.base_changes))} by more than an update of a block's matrix"
    elif ADAPTER_KINDS[adapter.config.kind].tensors.keys() != _SUMMED:
        what = f"its kind is {adapter.config.kind}, which does more than add an update"
    if what is not None:
        todo = "merge it alone, then the others one after another with --force-base"
        raise CheckpointError(f"{what}: it can be neither summed nor weighted", adapter.path, todo)
