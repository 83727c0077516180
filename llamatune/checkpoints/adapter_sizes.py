"""Sizes of an adapter's base, by the shapes of its tensors, compared with those of a given model. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from llamatune.checkpoints.adapter_header import EMBEDDING, HEAD
from llamatune.shapes.llama_config import LINEAR_SIZES, LlamaConfig

_UPDATE = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
_BLOCK = re.compile(r"model\.layers\.(\d{1,4})\.")
_SIZES = LINEAR_SIZES | dict.fromkeys((EMBEDDING, HEAD), ("vocab_size", "hidden_size"))


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def other_size(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, _Shaped], config: LlamaConfig
) -> str | None:
    """The first size of its base that an adapter states otherwise than ``config``: ``hidden_size 32, here 64``.

    None: there is none, or its tensors contradict each other or its ranks, as those of a damaged file do.

    Args:
        expected: the tensors that the adapter has on a base of this configuration.
        found: those that it has, A (r, in) and B (out, r).
    """
    stated: dict[str, int] = {}
    for name in expected.keys() & found.keys():
        match, shape = _UPDATE.fullmatch(name), tuple(found[name].shape)
        if match is None:
            continue
        module = match["module"]
        sizes = _SIZES.get(module) or _SIZES[module.rpartition(".")[2]]
        rank, size = (0, 1) if match["matrix"] == "A" else (1, 0)
        if len(shape) != 2 or shape[rank] != expected[name][rank]:
            return None
        if stated.setdefault(sizes[size], shape[size]) != shape[size]:
            return None
    for key, here in config.sizes().items():
        if stated.get(key, here) != here:
            return f"{key} {stated[key]:,}, here {here:,}"
    return _other_depth(expected, found, config.num_hidden_layers)


def _other_depth(expected: Mapping[str, object], found: Mapping[str, object], here: int) -> str | None:
    """The depth, where an update is of a block beyond the base's last, or none is of all blocks from one on."""
    depth = 1 + max(map(_block, found), default=-1)
    missing = [_block(name) for name in expected if name not in found]
    if depth > here or (0 < depth < here and missing and min(missing) >= depth):
        return f"num_hidden_layers {depth:,}{' or more' if depth > here else ''}, here {here:,}"
    return None


def _block(name: str) -> int:
    match = _BLOCK.match(name)
    return -1 if match is None else int(match[1])
