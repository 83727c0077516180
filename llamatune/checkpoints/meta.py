"""Meta checkpoints: other names, shards that split matrices, and q and k rows in pairs.

Meta rotates neighbouring rows of a head as pairs (x0, x1), (x2, x3), ...; Hugging Face rotates the first half of a head
against the second, (x0, x_{E/2}), ... The same model therefore stores the rows of q and k in another order. They are
permuted here, at the door, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from llamatune.checkpoints.checkpoint import Checkpoint, refuse_unfit
from llamatune.checkpoints.config_files import META_EMBEDDING, META_HEAD, Format, embedding_axis, meta_config
from llamatune.checkpoints.stored import Stored, stored_meta
from llamatune.shapes.config import LlamaConfig

_WHOLE = {
    "model.embed_tokens.weight": META_EMBEDDING,
    "model.norm.weight": "norm.weight",
    "lm_head.weight": META_HEAD,
}
_IN_BLOCK = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_IGNORED = "rope.freqs"


def meta_name(name: str) -> str:
    """Meta's name of a tensor: ``model.layers.3.mlp.up_proj.weight`` -> ``layers.3.feed_forward.w3.weight``."""
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    return f"layers.{layer}.{_IN_BLOCK[module]}.weight"


def is_rotated(name: str) -> bool:
    """Whether the rows of the tensor are rotated in pairs: the weights of q and k."""
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def rows_from_meta(W: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k, (heads * E, D), from Meta's order to Hugging Face's."""
    return W.view(-1, head_dim // 2, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)  # (H, 2, E/2, D)


def rows_to_meta(W: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k, (heads * E, D), from Hugging Face's order to Meta's."""
    return W.view(-1, 2, head_dim // 2, W.shape[1]).transpose(1, 2).reshape(W.shape)  # (H, E/2, 2, D)


def _row_in_meta(row: int, head_dim: int) -> int:
    head, within = divmod(row, head_dim)
    half, pair = divmod(within, head_dim // 2)
    return head * head_dim + 2 * pair + half


def shard_axis(name: str, embedding: int) -> int | None:
    """Along which axis Meta's shards split a tensor; None: each holds it whole (Meta's ``llama/model.py``)."""
    if name.endswith("norm.weight"):
        return None
    if name == "model.embed_tokens.weight":
        return embedding
    return 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0


class MetaCheckpoint(Checkpoint):
    """A directory of ``params.json`` and ``consolidated.XX.pth``.

    Without ``output.weight`` it is read as a tied model, and whoever loads, merges or counts it is warned: the format
    cannot say whether the head is tied or was lost.
    """

    format: Format = "meta"

    def __init__(self, path: Path, config: LlamaConfig, shards: Sequence[dict[str, Stored]], embedding: int) -> None:
        super().__init__(path, config)
        self.shards, self.embedding_axis = shards, embedding

    @classmethod
    def open(cls, path: Path) -> MetaCheckpoint:
        """Check configuration and archives against each other; no tensor is read."""
        shards = stored_meta(path)
        config = meta_config(path, shards)
        embedding = 0
        if META_EMBEDDING in shards[0]:
            embedding = embedding_axis(shards, config.hidden_size)
        ignored = {_IGNORED} | ({META_HEAD} if config.tie_word_embeddings else set())
        for shard in shards:
            expected = {}
            for name, shape in config.parameter_shapes():
                axis = shard_axis(name, embedding)
                part = tuple(n // len(shards) if i == axis else n for i, n in enumerate(shape))
                expected[meta_name(name)] = part if axis is None or shape[axis] % len(shards) == 0 else shape
            used = {name: part for name, part in shard.items() if name not in ignored}
            where = next(iter(shard.values())).path if shard else path
            refuse_unfit(
                where,
                expected,
                {name: part.shape for name, part in used.items()},
                dtypes={name: part.dtype for name, part in used.items()},
            )
        for name, _ in config.parameter_shapes():
            kinds = {shard[meta_name(name)].dtype for shard in shards}
            refuse_unfit(path, {}, {}, dtypes={name: "/".join(sorted(kinds))} if len(kinds) > 1 else {})
        return cls(path, config, shards, embedding)

    def parts(self, name: str) -> Sequence[Stored]:
        parts = [shard[meta_name(name)] for shard in self.shards]
        return parts[:1] if shard_axis(name, self.embedding_axis) is None else parts

    def tensor(self, name: str, mapped: bool = False) -> torch.Tensor:
        parts = self.parts(name)
        if len(parts) == 1:
            W = self._read(parts[0], mapped)
        else:
            axis = shard_axis(name, self.embedding_axis)
            assert axis is not None
            W = torch.empty(self.shape(name), dtype=self.dtype(name))
            for part, into in zip(parts, W.chunk(len(parts), axis), strict=True):
                self._fill(into, part)
        return rows_from_meta(W, self.config.head_dim) if is_rotated(name) else W

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        parts = self.parts(name)
        if is_rotated(name):
            rows = [_row_in_meta(row, self.config.head_dim) for row in rows]
        if shard_axis(name, self.embedding_axis) == 1:
            return torch.cat([self._read_rows(part, rows) for part in parts], dim=1)
        each = parts[0].shape[0]
        chosen = torch.empty((len(rows), *parts[0].shape[1:]), dtype=self.dtype(name))
        for number, part in enumerate(parts):
            places = [place for place, row in enumerate(rows) if row // each == number]
            if places:
                chosen[places] = self._read_rows(part, [rows[place] % each for place in places])
        return chosen
