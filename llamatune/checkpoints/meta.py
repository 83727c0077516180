"""Meta checkpoints, ``consolidated.XX.pth``, read and written: names, shards, and the order of q and k rows.

Meta rotates neighbouring rows of a head as pairs (x0, x1), (x2, x3), ...; Hugging Face rotates the first half of a head
against the second, (x0, x_{E/2}), ... The rows of q and k are therefore stored in another order; they are permuted in
this file alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llamatune.checkpoints.checkpoint import Checkpoint, refuse_unfit
from llamatune.checkpoints.config_json import EMBEDDING as HF_EMBEDDING
from llamatune.checkpoints.config_json import HEAD as HF_HEAD
from llamatune.checkpoints.model_directory import Format
from llamatune.checkpoints.params_json import EMBEDDING, HEAD, embedding_axis, read_params_json, write_params_json
from llamatune.checkpoints.tensor_bytes import tensor_bytes
from llamatune.checkpoints.tensor_locations import TensorLocation, locate_meta
from llamatune.durable_writing import writing
from llamatune.events import OnEvent, ignore_event
from llamatune.formats.manifest import Staging
from llamatune.formats.safetensors import data_bytes
from llamatune.formats.torch_archive_writer import ArchiveWriter
from llamatune.model.torch_dtypes import STORED_NAMES
from llamatune.shapes.config import LlamaConfig
from llamatune.tokenizers.copied_files import copy_file, copy_meta_tokenizer

_WHOLE = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "norm.weight",
    "lm_head.weight": HEAD,
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

    Without ``output.weight`` it is read as a tied model, with a warning: the format does not say whether the head is
    tied or was lost.
    """

    format: Format = "meta"

    def __init__(
        self, path: Path, config: LlamaConfig, shards: Sequence[dict[str, TensorLocation]], embedding: int
    ) -> None:
        super().__init__(path, config)
        self.shards, self.embedding_axis = shards, embedding

    @classmethod
    def open(cls, path: Path) -> MetaCheckpoint:
        """Check configuration and archives against each other; no tensor is read."""
        shards = locate_meta(path)
        config = read_params_json(path, shards)
        embedding = 0
        if EMBEDDING in shards[0]:
            embedding = embedding_axis(shards, config.hidden_size)
        ignored = {_IGNORED} | ({HEAD} if config.tie_word_embeddings else set())
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

    def parts(self, name: str) -> Sequence[TensorLocation]:
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

    def write_copy(
        self, staging: Staging, tensor_of: Callable[[str], torch.Tensor], dtype: torch.dtype | None, on_event: OnEvent
    ) -> None:
        shards, axis = len(self.shards), self.embedding_axis
        write_consolidated(
            staging.path, self.config, tensor_of, lambda name: dtype or self.dtype(name), shards, axis, tied_head=False
        )
        copy_file(self.path / "params.json", staging.path)
        copy_meta_tokenizer(self.path, staging.path, on_event)


def write_meta(
    staging: Staging,
    config: LlamaConfig,
    tensor_of: Callable[[str], torch.Tensor],
    dtype_of: Callable[[str], torch.dtype],
    tokenizer_source: Path | None = None,
    on_event: OnEvent = ignore_event,
) -> None:
    """Write a whole model in one shard, as ``write_huggingface`` does in the other format."""
    write_params_json(staging.path, config)
    write_consolidated(staging.path, config, tensor_of, dtype_of)
    if tokenizer_source is not None:
        copy_meta_tokenizer(tokenizer_source, staging.path, on_event)


def write_consolidated(
    directory: Path,
    config: LlamaConfig,
    tensor_of: Callable[[str], torch.Tensor],
    dtype_of: Callable[[str], torch.dtype],
    shards: int = 1,
    embedding_axis: int = 1,
    tied_head: bool = True,
) -> None:
    """The weights in Meta's names, rows and shards; ``tensor_of`` is asked for each tensor once, in order.

    Args:
        tensor_of: a weight by its Hugging Face name, in Hugging Face's layout.
        tied_head: also write the head of a tied model, which Meta's own loader expects to find.
    """
    shapes = list(config.parameter_shapes())
    if config.tie_word_embeddings and tied_head:
        shapes.insert(1, (HF_HEAD, (config.vocab_size, config.hidden_size)))
    declared = []
    for name, shape in shapes:
        axis = shard_axis(name, embedding_axis)
        part = tuple(n // shards if i == axis else n for i, n in enumerate(shape))
        dtype = dtype_of(HF_EMBEDDING if _is_tied_head(config, name) else name)
        declared.append((meta_name(name), STORED_NAMES[dtype], part))
    with contextlib.ExitStack() as stack:
        writers = []
        for shard in range(shards):
            file = stack.enter_context(writing(directory / f"consolidated.{shard:02d}.pth", data_bytes(declared)))
            writers.append(ArchiveWriter(file, f"consolidated.{shard:02d}", declared))
        for name, _ in shapes:
            if _is_tied_head(config, name):  # it follows the embedding, which W still is
                axis = 0
            else:
                W = tensor_of(name).detach().to("cpu", dtype_of(name))
                W = rows_to_meta(W, config.head_dim) if is_rotated(name) else W
                axis_or_none = shard_axis(name, embedding_axis)
                axis = -1 if axis_or_none is None else axis_or_none
            pieces = [W] * shards if axis < 0 else W.chunk(shards, axis)
            for writer, piece in zip(writers, pieces, strict=True):
                contiguous = piece.contiguous()
                writer.write(tensor_bytes(contiguous))
        for writer in writers:
            writer.finish()


def _is_tied_head(config: LlamaConfig, name: str) -> bool:
    return config.tie_word_embeddings and name == HF_HEAD
