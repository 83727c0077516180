"""Meta checkpoints, ``consolidated.XX.pth``, read and written: names, shards, and the order of q and k rows.

Meta rotates neighbouring rows of a head as pairs (x0, x1), (x2, x3), ...; Hugging Face rotates the first half of a head
against the second, (x0, x_{E/2}), ... The rows of q and k are therefore stored in another order; they are permuted in
this file alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from llamatune.checkpoints.checkpoint import Checkpoint, DtypeOf, TensorOf, refuse_unfit, warn_of_wide_weights
from llamatune.checkpoints.config_json import EMBEDDING as HF_EMBEDDING
from llamatune.checkpoints.config_json import HEAD as HF_HEAD
from llamatune.checkpoints.model_directory import Format, locate_meta, refuse_variant
from llamatune.checkpoints.params_json import EMBEDDING, HEAD, embedding_axis, read_params_json, write_params_json
from llamatune.checkpoints.tensor_bytes import tensor_bytes
from llamatune.events import OnEvent, ignore_event
from llamatune.formats.manifest import Staging
from llamatune.formats.torch_archive import writing_archive
from llamatune.model.torch_dtypes import STORED_NAMES
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.tokenizers.copied_files import copy_file, copy_meta_tokenizer

_WHOLE = {HF_EMBEDDING: EMBEDDING, "model.norm.weight": "norm.weight", HF_HEAD: HEAD}
_IN_BLOCK = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
_IGNORED = "rope.freqs"


def _meta_name(name: str) -> str:
    """Meta's name of a tensor: ``model.layers.3.mlp.up_proj.weight`` -> ``layers.3.feed_forward.w3.weight``."""
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    return f"layers.{layer}.{_IN_BLOCK[module]}.weight"


def _is_rotated(name: str) -> bool:
    """Whether the rows of the tensor are rotated in pairs: the weights of q and k."""
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def _rows_from_meta(W: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k, (heads * E, D), from Meta's order to Hugging Face's."""
    return W.view(-1, head_dim // 2, 2, W.shape[1]).transpose(1, 2).reshape(W.shape)  # (H, 2, E/2, D)


def _rows_to_meta(W: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k, (heads * E, D), from Hugging Face's order to Meta's."""
    return W.view(-1, 2, head_dim // 2, W.shape[1]).transpose(1, 2).reshape(W.shape)  # (H, E/2, 2, D)


def _row_in_meta(row: int, head_dim: int) -> int:
    head, within = divmod(row, head_dim)
    half, pair = divmod(within, head_dim // 2)
    return head * head_dim + 2 * pair + half


def _shard_axis(name: str, embedding_axis: int) -> int | None:
    """Along which axis Meta's shards split a tensor; None: each holds it whole (Meta's ``llama/model.py``)."""
    if name.endswith("norm.weight"):
        return None
    if name == HF_EMBEDDING:
        return embedding_axis
    return 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0


def _shard_shape(shape: tuple[int, ...], axis: int | None, shards: int) -> tuple[int, ...]:
    return tuple(size // shards if i == axis else size for i, size in enumerate(shape))


class MetaCheckpoint(Checkpoint):
    """A directory of ``params.json`` and ``consolidated.XX.pth``.

    Without ``output.weight`` it is read as a tied model, with a warning: the format does not say whether the head is
    tied or was lost.
    """

    format: Format = "meta"

    @classmethod
    def open(cls, path: Path, on_event: OnEvent = ignore_event, variant: str | None = None) -> MetaCheckpoint:
        """Check configuration and archives against each other; no tensor is read."""
        refuse_variant(path, variant)
        shards = locate_meta(path)
        config = read_params_json(path, shards)
        expected = {}
        for name, shape in config.parameter_shapes():
            axis = _shard_axis(name, embedding_axis(shards, config.hidden_size))
            divides = axis is None or shape[axis] % len(shards) == 0
            expected[_meta_name(name)] = _shard_shape(shape, axis, len(shards)) if divides else shape
        ignored = {_IGNORED, HEAD} if config.tie_word_embeddings else {_IGNORED}
        for shard in shards:
            where = next(iter(shard.values())).path if shard else path
            refuse_unfit(where, expected, {name: part for name, part in shard.items() if name not in ignored})
        parts = {name: [shard[_meta_name(name)] for shard in shards] for name, _ in config.parameter_shapes()}
        for name, [first, *others] in parts.items():
            dtypes = "/".join(sorted({first.dtype, *(part.dtype for part in others)}))  # no dtype, if shards differ
            refuse_unfit(path, {name: first.shape}, {name: dataclasses.replace(first, dtype=dtypes)})
        warn_of_wide_weights(path, (part for shard in shards for part in shard.values()), on_event)
        return cls(path, config, parts)

    def _split_axis(self, name: str) -> int | None:
        """Along which axis a tensor is split among the shards; None: the first holds it whole."""
        axes = enumerate(zip(self.shapes[name], self.parts[name][0].shape, strict=True))
        return next((axis for axis, (whole, part) in axes if part != whole), None)

    def tensor(self, name: str, mapped: bool = False) -> torch.Tensor:
        parts, axis = self.parts[name], self._split_axis(name)
        if axis is None:
            W = self._read(parts[0], mapped)
        else:
            W = torch.empty(self.shapes[name], dtype=self.dtype(name))
            for part, into in zip(parts, W.chunk(len(parts), axis), strict=True):
                self._fill(into, part)
        return _rows_from_meta(W, self.config.head_dim) if _is_rotated(name) else W

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        parts, axis = self.parts[name], self._split_axis(name)
        if _is_rotated(name):
            rows = [_row_in_meta(row, self.config.head_dim) for row in rows]
        if axis is None:
            return self._read_rows(parts[0], rows)
        if axis == 1:
            return torch.cat([self._read_rows(part, rows) for part in parts], dim=1)
        each = parts[0].shape[0]
        by_shard = itertools.groupby(rows, key=lambda row: row // each)
        return torch.cat([self._read_rows(parts[shard], [row % each for row in group]) for shard, group in by_shard])

    def write_copy(self, staging: Staging, tensor_of: TensorOf, dtype: torch.dtype | None, on_event: OnEvent) -> None:
        def dtype_of(name: str) -> torch.dtype:
            return dtype or self.dtype(name)

        shards, axis = len(self.parts[HF_EMBEDDING]), self._split_axis(HF_EMBEDDING) or 0
        _write_weights(staging.path, self.config, tensor_of, dtype_of, shards, axis, tied_head=False)
        copy_file(self.path / "params.json", staging.path)
        copy_meta_tokenizer(self.path, staging.path, on_event)


def write_meta(
    staging: Staging, config: LlamaConfig, tensor_of: TensorOf, dtype_of: DtypeOf, source: Path, on_event: OnEvent
) -> None:
    """Write a whole model in one shard, as ``write_huggingface`` does in the other format."""
    write_params_json(staging.path, config)
    _write_weights(staging.path, config, tensor_of, dtype_of, shards=1, embedding_axis=1, tied_head=True)
    copy_meta_tokenizer(source, staging.path, on_event)


def _write_weights(
    directory: Path,
    config: LlamaConfig,
    tensor_of: TensorOf,
    dtype_of: DtypeOf,
    shards: int,
    embedding_axis: int,
    tied_head: bool,
) -> None:
    """The weights in Meta's names, rows and shards; ``tensor_of`` is asked for each tensor once, in order.

    ``tied_head``: also write the head of a tied model, which Meta's own loader expects to find.
    """
    records = {name: [(_meta_name(name), _shard_axis(name, embedding_axis))] for name, _ in config.parameter_shapes()}
    if config.tie_word_embeddings and tied_head:
        records[HF_EMBEDDING].append((HEAD, 0))
    declared = [
        (meta_name, STORED_NAMES[dtype_of(name)], _shard_shape(shape, axis, shards))
        for name, shape in config.parameter_shapes()
        for meta_name, axis in records[name]
    ]
    with contextlib.ExitStack() as stack:
        paths = [directory / f"consolidated.{shard:02d}.pth" for shard in range(shards)]
        writers = [stack.enter_context(writing_archive(path, declared)) for path in paths]
        for name, stored in records.items():
            W = tensor_of(name).detach().to("cpu", dtype_of(name))
            W = _rows_to_meta(W, config.head_dim) if _is_rotated(name) else W
            for _, axis in stored:
                pieces = [W] * shards if axis is None else W.chunk(shards, axis)
                for writer, piece in zip(writers, pieces, strict=True):
                    contiguous = piece.contiguous()
                    writer.write(tensor_bytes(contiguous))
