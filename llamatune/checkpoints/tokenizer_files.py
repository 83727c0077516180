"""Copies the tokenizer files of a model directory byte for byte. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from llamatune.checkpoints.tokenizer_pieces import count_tokenizer_pieces
from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.safe_reading import open_regular
from llamatune.strict_json import dump_json

SENTENCEPIECE_FILE = "tokenizer.model"
_FILES = (
    SENTENCEPIECE_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_LARGEST = 256 << 20


def copy_file(source: Path, directory: Path) -> None:
    """Copy one regular file byte for byte, with the umask's mode."""
    with open_regular(source, max_bytes=_LARGEST) as original, writing(directory / source.name) as copy:
        shutil.copyfileobj(original, copy)


def copy_huggingface_tokenizer(source: Path, directory: Path, on_event: OnEvent = ignore_event) -> None:
    """Every tokenizer file that transformers reads, from a model directory of either format."""
    present = [name for name in _FILES if (source / name).exists()]
    for name in present:
        copy_file(source / name, directory)
    if not present:
        on_event(Notice(f"{source}: no tokenizer in it, so none is written", "warning"))
    if present == [SENTENCEPIECE_FILE] and (source / "params.json").exists():
        _complete_meta_tokenizer(source, directory, on_event)


def _complete_meta_tokenizer(source: Path, directory: Path, on_event: OnEvent) -> None:
    """Add the ``tokenizer_config.json`` that transformers needs beside Meta's ``tokenizer.model``."""
    try:
        count_tokenizer_pieces(source / SENTENCEPIECE_FILE)
    except CheckpointError:
        on_event(Notice(f"{source}: not SentencePiece; transformers needs a tokenizer.json beside it", "warning"))
        return
    facts = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": True,
    }
    with writing(directory / "tokenizer_config.json") as file:
        file.write(dump_json(facts))


def copy_meta_tokenizer(source: Path, directory: Path, on_event: OnEvent = ignore_event) -> None:
    """Copy ``tokenizer.model``, the only tokenizer file of a Meta directory."""
    if (source / SENTENCEPIECE_FILE).exists():
        copy_file(source / SENTENCEPIECE_FILE, directory)
    else:
        on_event(Notice(f"{source}: no tokenizer.model, which Meta's format needs; add it yourself", "warning"))
