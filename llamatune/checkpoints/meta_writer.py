"""Writes Meta's directories: ``params.json``, ``consolidated.XX.pth`` of plain tensors, ``tokenizer.model``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llamatune.checkpoints.checkpoint import STORED_DTYPES
from llamatune.checkpoints.config_files import feed_forward_size
from llamatune.checkpoints.meta import is_rotated, meta_name, rows_to_meta, shard_axis
from llamatune.checkpoints.tensors import tensor_bytes
from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError
from llamatune.formats.safetensors import data_bytes
from llamatune.formats.torch_archive_writer import ArchiveWriter
from llamatune.shapes.config import LlamaConfig
from llamatune.strict_json import dump_json

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


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
        shapes.insert(1, (_HEAD, (config.vocab_size, config.hidden_size)))
    declared = []
    for name, shape in shapes:
        axis = shard_axis(name, embedding_axis)
        part = tuple(n // shards if i == axis else n for i, n in enumerate(shape))
        dtype = dtype_of(_EMBEDDING if _is_tied_head(config, name) else name)
        declared.append((meta_name(name), STORED_DTYPES[dtype], part))
    with contextlib.ExitStack() as stack:
        writers = []
        for shard in range(shards):
            file = stack.enter_context(writing(directory / f"consolidated.{shard:02d}.pth", data_bytes(declared)))
            writers.append(ArchiveWriter(file, f"consolidated.{shard:02d}", declared))
        for name, _ in shapes:
            if _is_tied_head(config, name):  # comes right after the embedding, which W still holds
                axis = 0
            else:
                W = tensor_of(name).detach().to("cpu", dtype_of(name))
                W = rows_to_meta(W, config.head_dim) if is_rotated(name) else W
                axis_or_none = shard_axis(name, embedding_axis)
                axis = -1 if axis_or_none is None else axis_or_none
            pieces = [W] * shards if axis < 0 else W.chunk(shards, axis)
            for writer, piece in zip(writers, pieces, strict=True):
                held = piece.contiguous()
                writer.write(tensor_bytes(held))
        for writer in writers:
            writer.finish()


def write_params(directory: Path, config: LlamaConfig) -> None:
    """``params.json`` with settings that reproduce the feed-forward width."""
    with writing(directory / "params.json") as file:
        file.write(dump_json(meta_params(config)))


def meta_params(config: LlamaConfig) -> dict[str, Any]:
    """The configuration in Meta's words, which have neither a feed-forward width nor a head dimension of their own."""
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise CheckpointError(
            f"head_dim {config.head_dim} x {config.num_attention_heads} heads is not hidden_size {config.hidden_size}",
            "params.json", "Meta's format cannot say this; use --format hf",
        )  # fmt: skip
    multiple_of, multiplier = _feed_forward_settings(config)
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "multiple_of": multiple_of,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    if config.num_key_value_heads != config.num_attention_heads:
        params["n_kv_heads"] = config.num_key_value_heads
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if config.rope_theta != 10000.0:
        params["rope_theta"] = config.rope_theta
    return params


def _feed_forward_settings(config: LlamaConfig) -> tuple[int, float | None]:
    """``multiple_of`` and ``ffn_dim_multiplier`` that give the width: Meta's own values first, then any."""
    dim, width = config.hidden_size, config.intermediate_size
    for multiplier in (None, 1.3, 1.5):
        for multiple_of in (256, 1024, 4096, 512, 2048, 128, 64, 32, 16, 8, 4, 2, 1):
            if feed_forward_size(dim, multiple_of, multiplier or 1.0) == width:
                return multiple_of, multiplier
    multiplier = (width + 0.5) / int(2 * 4 * dim / 3)  # int() of the product is the width itself
    assert feed_forward_size(dim, 1, multiplier) == width
    return 1, multiplier


def _is_tied_head(config: LlamaConfig, name: str) -> bool:
    return config.tie_word_embeddings and name == _HEAD
