"""Meta checkpoints, ``consolidated.XX.pth``, read and written: names, shards, and the order of q and k rows.

The rows of q and k are stored in another order than Hugging Face's (``row_order``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llamatune.checkpoints.checkpoint import Checkpoint, fill_from, refuse_unfit, warn_of_wide_weights
from llamatune.checkpoints.config_json import EMBEDDING as HF_EMBEDDING
from llamatune.checkpoints.config_json import HEAD as HF_HEAD
from llamatune.checkpoints.model_directory import Format, locate_meta, refuse_variant
from llamatune.checkpoints.params_json import (
    EMBEDDING,
    HEAD,
    LLAMA_3_VOCABULARY,
    embedding_axis,
    read_params_json,
    write_params_json,
)
from llamatune.checkpoints.row_order import interleaved_row, is_rotated, rows_apart, rows_interleaved
from llamatune.checkpoints.tensor_bytes import tensor_bytes
from llamatune.checkpoints.weights import DtypeOf, StoredWeight, Weight, WeightOf, portions_of
from llamatune.errors import SpecError
from llamatune.events import OnEvent, ignore_event
from llamatune.formats.manifest import Staging
from llamatune.formats.torch_archive_writer import ArchiveWriter, writing_archive
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


def _shard_axis(name: str, embedding_axis: int) -> int | None:
    """Along which axis Meta's shards split a tensor; None: each holds it whole (Meta's ``llama/model.py``)."""
    if name.endswith("norm.weight"):
        return None
    if name == HF_EMBEDDING:
        return embedding_axis
    return 1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0


def _rows_in_shard(rows: slice, shard: int, each: int, origin: int) -> slice:
    """Those of ``rows`` that are in a shard of ``each`` rows, counted from the row ``origin``."""
    start = max(rows.start, shard * each)
    return slice(start - origin, max(start, min(rows.stop, (shard + 1) * each)) - origin)


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
                fill_from(into, part)
        return rows_apart(W, self.config.head_dim) if is_rotated(name) else W

    def is_rotated(self, name: str) -> bool:
        return is_rotated(name)

    def row_reader(self, name: str) -> Callable[[slice], torch.Tensor]:
        parts, axis = self.parts[name], self._split_axis(name)
        readers = [self._row_reader(part) for part in parts]
        each = parts[0].shape[0]

        def read(rows: slice) -> torch.Tensor:
            if axis is None:
                return readers[0](rows)
            if axis == 1:
                return torch.cat([reader(rows) for reader in readers], dim=1)
            shards = range(rows.start // each, (rows.stop - 1) // each + 1)
            return torch.cat([readers[shard](_rows_in_shard(rows, shard, each, shard * each)) for shard in shards])

        return (lambda rows: rows_apart(read(rows), self.config.head_dim)) if is_rotated(name) else read

    def rows(self, name: str, rows: Sequence[int]) -> torch.Tensor:
        parts, axis = self.parts[name], self._split_axis(name)
        if is_rotated(name):
            rows = [interleaved_row(row, self.config.head_dim) for row in rows]
        if axis is None:
            return self._read_rows(parts[0], rows)
        if axis == 1:
            return torch.cat([self._read_rows(part, rows) for part in parts], dim=1)
        each = parts[0].shape[0]
        by_shard = itertools.groupby(rows, key=lambda row: row // each)
        return torch.cat([self._read_rows(parts[shard], [row % each for row in group]) for shard, group in by_shard])

    def write_copy(self, staging: Staging, weight_of: WeightOf, dtype: torch.dtype | None, on_event: OnEvent) -> None:
        def dtype_of(name: str) -> torch.dtype:
            return dtype or self.dtype(name)

        shards, axis = len(self.parts[HF_EMBEDDING]), self._split_axis(HF_EMBEDDING) or 0
        _write_weights(staging, self.config, weight_of, dtype_of, shards, axis, tied_head=False)
        copy_file(self.path / "params.json", staging.path)
        copy_meta_tokenizer(self.path, staging.path, on_event)


def write_meta(
    staging: Staging,
    config: LlamaConfig,
    weight_of: WeightOf,
    dtype_of: DtypeOf,
    source: Path,
    on_event: OnEvent,
    shards: int = 1,
) -> None:
    """Write a whole model, as ``write_huggingface`` does in the other format; ``shards`` must divide its matrices."""
    sizes = {f"{name} {list(shape)}" for name, shape in config.parameter_shapes() if any(n % shards for n in shape[:2])}
    if config.num_key_value_heads % shards:
        sizes = {f"{config.num_key_value_heads} key-value heads"}
    if sizes:
        raise SpecError(f"--shards {shards} does not divide {min(sizes)}", None, "choose a number that divides them")
    write_params_json(staging.path, config)
    axis = 0 if config.vocab_size >= LLAMA_3_VOCABULARY else 1
    _write_weights(staging, config, weight_of, dtype_of, shards, axis, tied_head=True)
    copy_meta_tokenizer(source, staging.path, on_event)


def _write_weights(
    staging: Staging,
    config: LlamaConfig,
    weight_of: WeightOf,
    dtype_of: DtypeOf,
    shards: int,
    embedding_axis: int,
    tied_head: bool,
) -> None:
    """The weights in Meta's names, rows and shards; ``weight_of`` is asked for each tensor once, in order.

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
        files = [f"consolidated.{shard:02d}.pth" for shard in range(shards)]
        writers = [stack.enter_context(writing_archive(staging, file, declared)) for file in files]
        for name, shape in config.parameter_shapes():
            (_, axis), *copies = records[name]
            head_dim = config.head_dim if is_rotated(name) else None
            _write_weight(writers, weight_of(name), dtype_of(name), _shard_shape(shape, axis, shards), axis, head_dim)
            for _, axis in copies:
                if shards == 1:
                    writers[0].write(writers[0].last_tensor)
                else:
                    part = _shard_shape(shape, axis, shards)
                    _write_weight(writers, weight_of(name), dtype_of(name), part, axis, None)


def _write_weight(
    writers: Sequence[ArchiveWriter],
    weight: Weight,
    dtype: torch.dtype,
    shard_shape: tuple[int, ...],
    axis: int | None,
    head_dim: int | None,
) -> None:
    """Each shard's part of a weight; ``head_dim`` where its rows are rotated."""
    first, shards, copies = 0, len(writers), None
    if isinstance(weight, StoredWeight):
        copies = weight.copies(dtype, [shard_shape] * shards, rotated=head_dim is not None)
    if copies is not None:
        for writer, copied in zip(writers, copies, strict=True):
            writer.write(copied)
        return
    for in_order in portions_of(weight, dtype):
        portion = rows_interleaved(in_order, head_dim) if head_dim else in_order
        rows = slice(first, first + len(portion))
        if axis is None:
            pieces = [portion] * shards
        elif axis == 1:
            pieces = list(portion.chunk(shards, 1))
        else:
            pieces = [portion[_rows_in_shard(rows, shard, shard_shape[0], first)] for shard in range(shards)]
        for writer, piece in zip(writers, pieces, strict=True):
            if piece.numel():
                contiguous = piece.contiguous()
                writer.write(tensor_bytes(contiguous))
        first = rows.stop
