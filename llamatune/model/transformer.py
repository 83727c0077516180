"""LLaMA-2 (Touvron et al. 2023): pre-norm blocks of rotary grouped-query attention and SwiGLU feed-forward.

Module names are Hugging Face's, so a state dict's keys are a checkpoint's. Shapes: ``B`` batch, ``T`` tokens, ``S``
keys (cached ones and new ones), ``D`` hidden, ``H`` query heads, ``K`` key-value heads, ``E`` head dimension, ``F``
feed-forward, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamatune.model.attention import Documents, attend
from llamatune.model.compilable import compilable
from llamatune.model.config import LlamaConfig

Rotation = tuple[Tensor, Tensor]
"""cos and sin of the rotary angles, each (B or 1, 1, T, E), fp32."""


def call(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Run a part of a block as it is; activation checkpointing puts a recomputing caller in its place."""
    return function(*args)


def widened(x: Tensor) -> Tensor:
    """A 16-bit tensor in fp32; wider ones as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _UpcastLinear(torch.autograd.Function):
    """x W^T in x's precision with a frozen 16-bit W: one matrix is cast at a time, and none is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        (grad,) = grad_outputs
        return grad @ weight.to(grad.dtype), None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T; outside autocast the input's dtype decides in which precision the product is computed."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight)
    return _UpcastLinear.apply(x, weight)  # type: ignore[no-any-return, no-untyped-call]


class Embedding(nn.Embedding):
    """A row for each token id, (...) -> (..., D)."""

    def reset_parameters(self) -> None:
        """Nothing: weights are read, or drawn by ``initialise``."""


class Linear(nn.Linear):
    """A matrix without bias (LLaMA has none), (..., in) -> (..., out).

    ``quantized``, where there is one, computes the product in the place of ``weight``, which is None then.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.quantized: nn.Module | None = None

    def reset_parameters(self) -> None:
        """Nothing, as in ``Embedding``."""

    @classmethod
    def of(cls, config: LlamaConfig, module: str) -> Linear:
        """One of the seven linear layers of a block."""
        out_features, in_features = config.linear_shape(module)
        return cls(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.quantized is not None:
            return self.quantized(x)  # type: ignore[no-any-return]
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32 or wider (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.weight, self.eps)


@compilable
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = widened(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * widened(weight)).to(x.dtype)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Rotation:
    """cos and sin for ``positions`` (B or 1, T), each (B or 1, 1, T, E) in fp32 (Su et al. 2021, eq. 34).

    The two halves of a head hold the pairs' first and second members (rotate-half, Hugging Face's layout).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents  # (E/2,)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, E/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, 1, T, E)
    return angles.cos(), angles.sin()


@compilable
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of ``x`` (B, H, T, E) by its position's angle, in x's dtype."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


_FIRST_ROOM_TOKENS = 256


class KVCache:
    """Keys and values of the tokens seen so far, for inference only.

    ``update`` of a layer appends (B, K, T, E) and returns all of it, (B, K, S, E); ``length`` grows with the last one.
    Room doubles as it is used up, up to ``capacity`` tokens, and a layer at a time, so that little is held twice.
    """

    def __init__(
        self, config: LlamaConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._capacity, self._layers = capacity, config.num_hidden_layers
        shape = (2, batch, config.num_key_value_heads, 0, config.head_dim)
        self._stored = [torch.empty(shape, dtype=dtype, device=device) for _ in range(self._layers)]
        self.length = 0

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + key.shape[2]
        if end > self._stored[layer].shape[3]:
            self._stored[layer] = self._with_room(self._stored[layer], end)
        keys, values = self._stored[layer]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        if layer == self._layers - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def _with_room(self, stored: Tensor, tokens: int) -> Tensor:
        room = max(tokens, min(self._capacity, max(2 * tokens, _FIRST_ROOM_TOKENS)))
        grown = stored.new_empty((*stored.shape[:3], room, stored.shape[4]))
        grown[:, :, :, : self.length] = stored[:, :, :, : self.length]
        return grown

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i continue what row ``rows[i]`` held (beam search); what is not used yet is not copied."""
        moved = [row for row, source in enumerate(rows) if row != source]
        if not moved:
            return
        device = self._stored[0].device
        targets, sources = torch.tensor(moved, device=device), torch.tensor([rows[row] for row in moved], device=device)
        for stored in self._stored:
            used = stored[:, :, :, : self.length]
            used.index_copy_(1, targets, used.index_select(1, sources))


@dataclass(frozen=True)
class Context:
    """What every block of one forward pass shares.

    ``mask`` bool (B, 1, T, S); ``documents``: the samples in a row without padding; ``rows``: the positions whose final
    state is asked for, all that the last block computes once its keys and values are made.
    """

    rotation: Rotation
    mask: Tensor | None = None
    cache: KVCache | None = None
    documents: Documents | None = None
    rows: Tensor | None = None
    last_layer: int = -1

    def needed(self, x: Tensor, layer: int) -> Tensor:
        """``x`` (1, N, ...), or in the last layer only its asked-for positions."""
        return x if self.rows is None or layer != self.last_layer else x.index_select(1, self.rows)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = Linear.of(config, "q_proj")
        self.k_proj = Linear.of(config, "k_proj")
        self.v_proj = Linear.of(config, "v_proj")
        self.o_proj = Linear.of(config, "o_proj")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (
            project(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H or K, T, E)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *context.rotation), rotate(k, *context.rotation)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)  # (B, K, S, E)
        o = attend(q, k, v, context.mask, context.documents)  # (B, H, T, E)
        o = o.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * E)
        return self.o_proj(context.needed(o, self.layer))  # type: ignore[no-any-return]


@compilable
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020, eq. 6), (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear.of(config, "gate_proj")
        self.up_proj = Linear.of(config, "up_proj")
        self.down_proj = Linear.of(config, "down_proj")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and added to the residual stream (B, T, D).

    The three ``run_*`` callers are where activation checkpointing enters, from outside.
    """

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.run_block: Callable[..., Tensor] = call
        self.run_attention: Callable[..., Tensor] = call
        self.run_feed_forward: Callable[..., Tensor] = call

    def attend(self, x: Tensor, context: Context) -> Tensor:
        return self.self_attn(self.input_layernorm(x), context)  # type: ignore[no-any-return]

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = context.needed(x, self.self_attn.layer) + self.run_attention(self.attend, x, context)
        return x + self.run_feed_forward(self.feed_forward, x)


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the part whose names start with ``model.``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """The whole model, made without a weight drawn. Its parameters' names are ``config.parameter_shapes()``'s.

    ``activation_dtype`` is the dtype of the residual stream; None: that of the embedding weights.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_dtype: torch.dtype | None = None
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def head_weight(self) -> Tensor:
        """(V, D); the embedding's where the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Documents | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Final-norm states (B, T, D) of ``input_ids`` (B, T), or (1, len(rows), D).

        Args:
            positions: (B or 1, T); by default those of the documents, else they go on from the cache's length.
            mask: bool (B, 1, T, S), True where a query may look; None: causal, which right padding needs no mask for.
                With a cache that already holds tokens, T > 1 needs a mask.
            documents: the samples in the one row of ``input_ids``.
            rows: positions in the one row whose states are asked for; None: all.
        """
        x = self.model.embed_tokens(input_ids)  # (B, T, D)
        if self.activation_dtype is not None:
            x = x.to(self.activation_dtype)
        if positions is None and documents is not None:
            positions = documents.positions
        if positions is None:
            start = 0 if cache is None else cache.length
            positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        rotation = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        context = Context(rotation, mask, cache, documents, rows, len(self.model.layers) - 1)
        for block in self.model.layers:
            assert isinstance(block, Block)
            x = block.run_block(block, x, context)
        return self.model.norm(x)  # type: ignore[no-any-return]

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D), in their dtype."""
        return linear(hidden, self.head_weight)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (B, T, V); the arguments are those of ``hidden_states``."""
        return self.head(self.hidden_states(input_ids, positions, mask, cache))


def initialise(model: Transformer, seed: int, std: float = 0.02) -> None:
    """Draw every weight anew, in place: matrices from N(0, std²) in fp32, norms 1; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
