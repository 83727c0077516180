"""Copies of tokenizer files, byte for byte, from one model directory to another."""

from __future__ import annotations

import shutil
from pathlib import Path

from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.safe_reading import open_regular
from llamatune.strict_json import write_json
from llamatune.tokenizers.tokenizer import SENTENCEPIECE_FILE

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
    """Write the ``tokenizer_config.json`` that transformers needs beside a ``tokenizer.model``."""
    from llamatune.tokenizers.sentencepiece import count_pieces  # importing the library takes 40 ms

    try:
        count_pieces(source / SENTENCEPIECE_FILE)
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
    write_json(directory / "tokenizer_config.json", facts)


def copy_meta_tokenizer(source: Path, directory: Path, on_event: OnEvent = ignore_event) -> None:
    """The ``tokenizer.model`` of a model directory, the one tokenizer file of Meta's format."""
    if (source / SENTENCEPIECE_FILE).exists():
        copy_file(source / SENTENCEPIECE_FILE, directory)
    else:
        on_event(Notice(f"{source}: no tokenizer.model, which Meta's format needs: add it yourself", "warning"))
