"""Joined products: q, k, v of a block as one matrix product, and gate, up as another, for generation on a CPU.

A product of a small matrix takes less time than the calls around it, so small ones are copied into one. Larger ones are
joined where they lie behind one another: gate and up in the pages of a safetensors file sorted by name, as most are, q,
k and v too in one of llamatune's, and all of them in int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llamatune.model.adjacent_tensors import adjacent
from llamatune.model.layers import Linear, linear
from llamatune.model.packed_weight import PackedWeight
from llamatune.model.products import LEAST_ELEMENTS
from llamatune.model.rope import Rotation, rotate, rotate_alike
from llamatune.model.transformer import Attention, Block, FeedForward
from llamatune.shapes.llama_config import GATE_UP_MODULES, QKV_MODULES, LlamaConfig


def copied_modules(config: LlamaConfig) -> frozenset[str]:
    """The linear layers whose weights are copied into joined ones in a model of these sizes."""
    return frozenset(name for group in (QKV_MODULES, GATE_UP_MODULES) if _is_small(config, group) for name in group)


def _is_small(config: LlamaConfig, group: Sequence[str]) -> bool:
    elements = sum(rows * columns for rows, columns in map(config.linear_shape, group))
    has_biases = {name in config.biased_modules for name in group}
    return elements < LEAST_ELEMENTS and len(has_biases) == 1


def join_products(block: Block, config: LlamaConfig) -> None:
    """Let a block with plain layers, which may get adapters later, compute joined products where they can be.

    These are of ``copied_modules``, of matrices behind one another, and of quantised layers. The weights of the layers
    become rows of the joined ones. Those of a group that differ in dtype stay apart. Packed weights are rearranged.
    """
    names, weights = copied_modules(config), []
    if (joined := _join(block.self_attn, QKV_MODULES, names)) is not None:
        block.self_attn = _JoinedAttention(block.self_attn, joined)
        weights.append(joined.weight)
    if (joined := _join(block.mlp, GATE_UP_MODULES, names)) is not None:
        block.mlp = _JoinedFeedForward(block.mlp, joined)
        weights.append(joined.weight)
    for weight in (*weights, *block.modules()):  # joined ones before their parts
        if isinstance(weight, PackedWeight):
            weight.rearrange()


@dataclass(frozen=True)
class _JoinedTensors:
    """Matrices and biases of several layers behind one another; what the layers hold are parts of them."""

    weight: Tensor | PackedWeight
    bias: Tensor | None
    any_layout: bool

    def __deepcopy__(self, memo: object) -> _JoinedTensors:
        return self  # a model with an adapter shares the base's

    def suits(self, x: Tensor) -> bool:
        """Whether one product with ``x`` is quicker than several: not where it would unpack too much at once."""
        return not isinstance(self.weight, PackedWeight) or self.weight.multiplies_joined(x)

    def product(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out of all layers)."""
        if not isinstance(self.weight, PackedWeight):
            return linear(x, self.weight, self.bias, self.any_layout)
        y: Tensor = self.weight(x)
        return y if self.bias is None else y.add_(self.bias)


def _join(module: nn.Module, group: Sequence[str], names: frozenset[str]) -> _JoinedTensors | None:
    """The tensors of the layers of a group in one each; None: they stay apart."""
    layers: list[Linear] = [getattr(module, name) for name in group]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if len(biases) not in (0, len(group)):
        return None
    packed = [layer.quantized for layer in layers if isinstance(layer.quantized, PackedWeight)]
    weight: Tensor | PackedWeight | None = None
    if len(packed) == len(group) and len(set(map(type, packed))) == 1:
        weight = packed[0].joined(packed)
    elif not packed and len({layer.weight.dtype for layer in layers}) == 1:
        copied = names.issuperset(group)
        weight = _concatenated("weight", layers) if copied else adjacent([layer.weight for layer in layers])
    if weight is None:
        return None
    return _JoinedTensors(weight, _concatenated("bias", layers) if biases else None, layers[0].any_layout)


def _concatenated(name: str, layers: Sequence[nn.Module]) -> Tensor:
    """The tensors of all layers in one; theirs become parts of it."""
    parts = [getattr(layer, name) for layer in layers]
    with torch.no_grad():
        joined = torch.cat(parts)
    for layer, part in zip(layers, torch.split(joined, [len(part) for part in parts]), strict=True):
        setattr(layer, name, nn.Parameter(part, requires_grad=False))
    return joined


class _Joined(nn.Module):
    """Holds the layers of another module, and the tensors of some of them joined."""

    group: tuple[str, ...]
    joined: _JoinedTensors

    def take_layers_of(self, module: nn.Module, joined: _JoinedTensors) -> None:
        nn.Module.__init__(self)
        for name, layer in module.named_children():
            self.add_module(name, layer)
        self.training, self.joined = module.training, joined

    @property
    def layers(self) -> list[Linear]:
        return [self._modules[name] for name in self.group]  # type: ignore[misc]  # in less time than as attributes

    def products(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(..., in) -> (..., out of all layers), with the updates of adapters in it, and its parts by layers."""
        y, layers = self.joined.product(x), self.layers
        parts = torch.split(y, [layer.out_features for layer in layers], dim=-1)
        for layer, part in zip(layers, parts, strict=True):
            updated = layer.updated(x, part)
            if updated is not part:
                part.copy_(updated)
        return y, parts


class _JoinedAttention(_Joined, Attention):
    """q, k and v by one product; q and k are rotated together."""

    group = QKV_MODULES

    def __init__(self, attention: Attention, joined: _JoinedTensors) -> None:
        self.take_layers_of(attention, joined)
        self.layer, self.head_dim = attention.layer, attention.head_dim
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def rotated(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        if not self.joined.suits(x):
            return super().rotated(x, rotation)
        y, (q, k, v) = self.products(x)
        if self.head_norms:
            return *rotate(self.heads(q, self.q_norm), self.heads(k, self.k_norm), *rotation), self.heads(v)
        turned = self.heads(y[..., : q.shape[-1] + k.shape[-1]])  # (B, H + K, T, E)
        turned = rotate_alike(turned, *rotation)
        H = q.shape[-1] // self.head_dim
        return turned[:, :H], turned[:, H:], self.heads(v)


class _JoinedFeedForward(_Joined, FeedForward):
    """gate and up by one product."""

    group = GATE_UP_MODULES

    def __init__(self, feed_forward: FeedForward, joined: _JoinedTensors) -> None:
        self.take_layers_of(feed_forward, joined)

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.products(x)[1] if self.joined.suits(x) else super().gate_and_up(x)
