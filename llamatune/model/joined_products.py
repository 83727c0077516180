"""Joined products: q, k, v of a block as one matrix product, and gate, up as another, for generation on a CPU.

A product of a small matrix takes less time than the calls around it. Larger matrices are left apart: they would have
to be copied from the file's pages, and nothing is gained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llamatune.model.layers import Linear, linear
from llamatune.model.products import LEAST_ELEMENTS
from llamatune.model.rope import Rotation, rotate, rotate_alike
from llamatune.model.transformer import Attention, Block, FeedForward, Transformer
from llamatune.shapes.llama_config import LlamaConfig

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def joined_modules(config: LlamaConfig) -> frozenset[str]:
    """The linear layers whose products are joined in a model of these sizes."""
    return frozenset(name for group in _GROUPS if _is_small(config, group) for name in group)


def _is_small(config: LlamaConfig, group: Sequence[str]) -> bool:
    elements = sum(rows * columns for rows, columns in map(config.linear_shape, group))
    has_biases = {name in config.biased_modules for name in group}
    return elements < LEAST_ELEMENTS and len(has_biases) == 1


def join_products(model: Transformer) -> None:
    """Let a model with plain layers, which may get adapters later, compute the products of ``joined_modules`` so.

    The weights of its layers become rows of the joined ones. Those of a group that differ in dtype stay apart.
    """
    names = joined_modules(model.config)
    for block in model.model.layers:
        assert isinstance(block, Block)
        if names.issuperset(_GROUPS[0]) and _is_alike(block.self_attn, _GROUPS[0]):
            block.self_attn = _JoinedAttention(block.self_attn)
        if names.issuperset(_GROUPS[1]) and _is_alike(block.mlp, _GROUPS[1]):
            block.mlp = _JoinedFeedForward(block.mlp)


def _is_alike(module: nn.Module, group: Sequence[str]) -> bool:
    return len({module.get_submodule(name).weight.dtype for name in group}) == 1


@dataclass(frozen=True)
class _JoinedTensors:
    """Matrices and biases of several layers behind one another; what the layers hold are parts of them."""

    weight: Tensor
    bias: Tensor | None

    def __deepcopy__(self, memo: object) -> _JoinedTensors:
        return self  # a model with an adapter shares the base's


class _Joined(nn.Module):
    """Holds the layers of another module, and the tensors of some of them joined."""

    group: tuple[str, ...]
    joined: _JoinedTensors

    def take_layers_of(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        for name, layer in module.named_children():
            self.add_module(name, layer)
        self.training = module.training
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        weight = self._join("weight", [layer.weight for layer in self.layers])
        self.joined = _JoinedTensors(weight, self._join("bias", biases) if biases else None)

    def _join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """The tensors of all layers in one; theirs become parts of it."""
        with torch.no_grad():
            joined = torch.cat(list(parts))
        for layer, part in zip(self.layers, torch.split(joined, [len(part) for part in parts]), strict=True):
            setattr(layer, name, nn.Parameter(part, requires_grad=False))
        return joined

    @property
    def layers(self) -> list[Linear]:
        return [getattr(self, name) for name in self.group]

    def products(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(..., in) -> (..., out of all layers), with the updates of adapters in it, and its parts by layers."""
        y, layers = linear(x, self.joined.weight, self.joined.bias), self.layers
        parts = torch.split(y, [layer.out_features for layer in layers], dim=-1)
        for layer, part in zip(layers, parts, strict=True):
            updated = layer.updated(x, part)
            if updated is not part:
                part.copy_(updated)
        return y, parts


class _JoinedAttention(_Joined, Attention):
    """q, k and v by one product; q and k are rotated together."""

    group = _GROUPS[0]

    def __init__(self, attention: Attention) -> None:
        self.take_layers_of(attention)
        self.layer, self.head_dim = attention.layer, attention.head_dim
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def rotated(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        y, (q, k, v) = self.products(x)
        if self.head_norms:
            return *rotate(self.heads(q, self.q_norm), self.heads(k, self.k_norm), *rotation), self.heads(v)
        turned = self.heads(y[..., : q.shape[-1] + k.shape[-1]])  # (B, H + K, T, E)
        turned = rotate_alike(turned, *rotation)
        H = q.shape[-1] // self.head_dim
        return turned[:, :H], turned[:, H:], self.heads(v)


class _JoinedFeedForward(_Joined, FeedForward):
    """gate and up by one product."""

    group = _GROUPS[1]

    def __init__(self, feed_forward: FeedForward) -> None:
        self.take_layers_of(feed_forward)

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.products(x)[1]
