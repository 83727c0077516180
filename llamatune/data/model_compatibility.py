"""Checks of prepared rows against a model: token ids, row lengths, tokenizer."""

from __future__ import annotations

from pathlib import Path

from llamatune.data.batches import Prepared, Split
from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent
from llamatune.shapes.llama_config import LlamaConfig
from llamatune.tokenizers.loading import load_tokenizer, tokenizer_file


def check_rows(split: Split, config: LlamaConfig, where: str, on_event: OnEvent) -> None:
    """Raise ``CheckpointError`` for an id beyond the model's embedding; warn about rows beyond its context length."""
    if split.largest_id >= config.vocab_size:
        what = f"tokenizer id {split.largest_id} >= {config.vocab_size} embedding rows"
        raise CheckpointError(what, where, "prepare the data with the tokenizer of this model")
    longest, known = max(split.lengths, default=0), config.max_position_embeddings
    if longest > known:
        on_event(Notice(f"{where}: a row of {longest} tokens exceeds the model's context length of {known}", "warning"))


def check_tokenizer(prepared: Prepared, model: Path, force_base: bool, on_event: OnEvent) -> None:
    """Raise ``CheckpointError`` if the rows were encoded with another tokenizer than the model directory's."""
    check_fingerprint(prepared.manifest.tokenizer_fingerprint, model, force_base, on_event)


def check_fingerprint(fingerprint: str | None, model: Path, force_base: bool, on_event: OnEvent) -> None:
    """``check_tokenizer`` of rows whose tokenizer has this fingerprint."""
    file = tokenizer_file(model)
    if file is None:
        on_event(Notice(f"{model} has no tokenizer to compare the data's tokenizer with", "warning"))
        return
    if load_tokenizer(model).fingerprint == fingerprint:
        return
    what = "the data was prepared with another tokenizer than the model's"
    if not force_base:
        raise CheckpointError(what, file, "prepare it again with this one, or pass --force-base")
    on_event(Notice(f"{what}; accepted because of --force-base", "warning"))
