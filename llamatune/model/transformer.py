"""LLaMA-2 (Touvron et al. 2023): pre-norm blocks of rotary grouped-query attention and SwiGLU feed-forward.

Module names are Hugging Face's, so a state dict's keys are a checkpoint's. Shapes: ``B`` batch, ``T`` tokens, ``S``
keys (cached ones and new ones), ``D`` hidden, ``H`` query heads, ``K`` key-value heads, ``E`` head dimension, ``F``
feed-forward, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llamatune.model.attention import Documents, added, attend, mask_behind
from llamatune.model.kv_cache import LayerCache
from llamatune.model.layers import Embedding, Linear, RMSNorm, linear, product_dtype, swiglu
from llamatune.model.rope import Rotation, rotary_angles, rotate
from llamatune.model.rows_by_length import Groups
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.shapes.rope_scaling import DynamicScaling


@dataclass(frozen=True)
class Context:
    """What every block of one forward pass shares.

    ``mask`` (B, 1, T, S) as ``attend`` takes it; ``documents``: the samples in a row without padding.
    """

    rotation: Rotation
    mask: Tensor | None = None
    cache: LayerCache | None = None
    documents: Documents | None = None


def select_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    """The positions ``rows`` of x (1, N, ...); None: all."""
    return x if rows is None else x.index_select(1, rows)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023), (B, T, D) -> (B, T, D), or (1, len(rows), D)."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = Linear.of(config, "q_proj")
        self.k_proj = Linear.of(config, "k_proj")
        self.v_proj = Linear.of(config, "v_proj")
        self.o_proj = Linear.of(config, "o_proj")
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.rms_norm_eps) if config.head_norms else None for _ in range(2)
        )

    def forward(self, x: Tensor, context: Context, rows: Tensor | None = None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.rotated(x, context.rotation)
        cache = context.cache
        groups: Groups = ()
        if cache is not None:
            (k, v), groups = cache.update(self.layer, k, v), cache.groups  # (B, K, S, E)
        o = attend(q, k, v, context.mask, context.documents, groups)  # (B, H, T, E)
        o = o.transpose(1, 2).reshape(B, T, -1)  # (B, T, H * E)
        return self.o_proj(select_rows(o, rows))  # type: ignore[no-any-return]

    def rotated(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, E) and keys (B, K, T, E), rotated, and values."""
        q = self.heads(self.q_proj(x), self.q_norm)
        k = self.heads(self.k_proj(x), self.k_norm)
        v = self.heads(self.v_proj(x))
        return *rotate(q, k, *rotation), v

    @property
    def head_norms(self) -> tuple[RMSNorm, ...]:
        """Those of q and k, or none."""
        return () if self.q_norm is None or self.k_norm is None else (self.q_norm, self.k_norm)

    def heads(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """(B, heads, T, E) of (B, T, heads · E), each head normalised if there is a ``norm``."""
        B, T, _ = x.shape
        if norm is not None:
            x = norm(x.reshape(-1, self.head_dim))  # rows, as compiled functions and kernels take them
        return x.view(B, T, -1, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020, eq. 6), (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear.of(config, "gate_proj")
        self.up_proj = Linear.of(config, "up_proj")
        self.down_proj = Linear.of(config, "down_proj")
        self.gate_proj.any_layout = self.up_proj.any_layout = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*self.gate_and_up(x)))  # type: ignore[no-any-return]

    def gate_and_up(self, x: Tensor) -> tuple[Tensor, ...]:
        """gate(x) and up(x), (B, T, F)."""
        return self.gate_proj(x), self.up_proj(x)


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and added to the residual stream (B, T, D).

    A block that computes the same in another way is a subclass that overrides ``forward``; ``take_layers_of`` gives it
    the layers of an existing block.
    """

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def take_layers_of(self, block: Block) -> None:
        """Hold the layers of another block under the same names, and its training mode."""
        nn.Module.__init__(self)
        for name, layer in block.named_children():
            self.add_module(name, layer)
        self.training = block.training

    def attend(self, x: Tensor, context: Context, rows: Tensor | None) -> Tensor:
        return self.self_attn(self.input_layernorm(x), context, rows)  # type: ignore[no-any-return]

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]

    def forward(self, x: Tensor, context: Context, rows: Tensor | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); with ``rows``, once keys and values are made, only these positions: (1, rows, D)."""
        x = select_rows(x, rows) + self.attend(x, context, rows)
        return x + self.feed_forward(x)


class Decoder(nn.Module):
    """Embedding, blocks and final norm: the part whose names start with ``model.``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Head(Linear):
    """The output layer, (B, T, D) -> logits (B, T, V), or what ``read`` makes of the states."""

    def forward(self, x: Tensor, read: Any = linear) -> Any:  # type: ignore[override]
        return read(x, self.weight)


class Transformer(nn.Module):
    """The whole model, made without a weight drawn. Its parameters' names are ``config.parameter_shapes()``'s.

    ``activation_dtype`` is the dtype of the residual stream; None: that of the embedding weights. ``is_streamed``: the
    weights of its blocks are brought while it computes (``streamed_blocks``).
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_dtype: torch.dtype | None = None
        self.is_streamed = False
        self.model = Decoder(config)
        self.lm_head = None if config.tie_word_embeddings else Head(config.hidden_size, config.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def product_dtype(self) -> torch.dtype:
        """What matrix products are computed in."""
        return product_dtype(self.model.embed_tokens.weight.new_empty(0, dtype=self.activation_dtype))

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        lengths: tuple[int, ...] | None = None,
        rows: Tensor | None = None,
        read: Callable[[Tensor, Tensor], Any] = linear,
    ) -> Any:
        """Logits (B, T, V) of ``input_ids`` (B, T), or what ``read`` makes of the final states.

        Args:
            positions: (B or 1, T); by default they restart with each sample, or go on from the cache's length.
            mask: bool (B, 1, T, S), True where a query may look, within the sliding window too; None: causal, also
                behind the tokens of a cache, which right padding needs no mask for.
            lengths: those of the samples in the one row of ``input_ids``, which holds several.
            rows: positions in the one row whose states are asked for, all that the last block computes; None: all.
            read: gets the final-norm states (B, T, D), or (1, len(rows), D), and the weight of the head (V, D), which
                is the embedding's where the two are tied.
        """
        x = self.model.embed_tokens(input_ids).to(dtype=self.activation_dtype)  # (B, T, D)
        start, T = 0 if cache is None else cache.length, input_ids.shape[1]
        window, scaling = self.config.sliding_window, self.config.rope_scaling
        if window is not None and lengths is None and mask is None and start == 0 and len(input_ids) == 1:
            lengths = (T,)
        documents = None if lengths is None else Documents(lengths, self.device, window, product_dtype(x))
        if documents is None and mask is None:
            mask = mask_behind(start, T, window, self.device)
        if mask is not None and not mask.is_cuda:
            mask = added(mask, product_dtype(x))  # once, not in every block
        if positions is None and documents is not None:
            positions = documents.positions
        elif positions is None:
            positions = torch.arange(start, start + T, device=input_ids.device)[None]
        sizes = documents.lengths_by_token() if documents and isinstance(scaling, DynamicScaling) else None
        rotation = rotary_angles(positions, self.config.head_dim, self.config.rope_theta, scaling, sizes)
        if torch.is_inference_mode_enabled():  # once, where no one else has the tensors
            rotation = rotation[0].to(product_dtype(x)), rotation[1].to(product_dtype(x))
        context = Context(rotation, mask, cache, documents)
        *earlier, last = self.model.layers
        for block in earlier:
            x = block(x, context)
        hidden = self.model.norm(last(x, context, rows))
        if self.lm_head is None:
            return read(hidden, self.model.embed_tokens.weight)
        return self.lm_head(hidden, read)
