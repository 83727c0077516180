"""Tokenizer files of one model directory in another, of the same format or of the other one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.safe_reading import open_regular
from llamatune.strict_json import read_json, write_json
from llamatune.tokenizers.added_tokens import ADDED, CONFIG, LARGEST_JSON_BYTES, ROLES
from llamatune.tokenizers.chat_template_files import DEFAULT, TEMPLATE_FILE, read_chat_templates, template_entry
from llamatune.tokenizers.loading import is_tiktoken
from llamatune.tokenizers.tiktoken_file import config_of, definition_of, ranks_of, read_ranks, written
from llamatune.tokenizers.tokenizer import JSON_FILE, SENTENCEPIECE_FILE

_FILES = (SENTENCEPIECE_FILE, JSON_FILE, CONFIG, ROLES, ADDED, "chat_template.json")
_LARGEST = 256 << 20
_V5_CLASS, _V4_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


def copy_file(source: Path, directory: Path) -> None:
    """Copy one regular file byte for byte, with the umask's mode."""
    with open_regular(source, max_bytes=_LARGEST) as original, writing(directory / source.name) as copy:
        shutil.copyfileobj(original, copy)


def copy_huggingface_tokenizer(source: Path, directory: Path, on_event: OnEvent = ignore_event) -> None:
    """Every tokenizer file that transformers reads, from a model directory of either format.

    A chat template is written both where transformers 5 keeps it and where other readers look; several go into
    ``tokenizer_config.json`` alone, which all read.
    """
    present = [name for name in _FILES if (source / name).exists()]
    if present == [SENTENCEPIECE_FILE] and (source / "params.json").exists():
        _write_from_meta(source / SENTENCEPIECE_FILE, directory, on_event)
        return
    for name in present:
        if name != CONFIG:
            copy_file(source / name, directory)
    facts = read_json(source / CONFIG, max_bytes=LARGEST_JSON_BYTES) if CONFIG in present else {}
    templates = read_chat_templates(source, facts, on_event)
    if templates.keys() == {DEFAULT}:
        with writing(directory / TEMPLATE_FILE) as file:
            file.write(templates[DEFAULT].encode())
    changed = _for_every_reader(facts)
    if templates:
        changed["chat_template"] = template_entry(templates)
    if changed != facts:
        write_json(directory / CONFIG, changed)
    elif CONFIG in present:
        copy_file(source / CONFIG, directory)
    if not present:
        on_event(Notice(f"{source}: no tokenizer in it, so none is written", "warning"))


def _for_every_reader(facts: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json`` as transformers 5 writes it, in the words that transformers 4 knows too."""
    changed = dict(facts)
    if facts.get("tokenizer_class") == _V5_CLASS:
        changed["tokenizer_class"] = _V4_CLASS
    if isinstance(facts.get("extra_special_tokens"), list):
        listed = changed.pop("extra_special_tokens")
        changed["additional_special_tokens"] = [*(facts.get("additional_special_tokens") or []), *listed]
    return changed


def _write_from_meta(model: Path, directory: Path, on_event: OnEvent) -> None:
    """The files that transformers needs: with Meta's ``tokenizer.model``, or in place of tiktoken's."""
    from llamatune.tokenizers.loading import count_pieces  # importing the library takes 40 ms

    try:
        if is_tiktoken(model):  # transformers would take a copy of it for a SentencePiece model
            write_json(directory / JSON_FILE, definition_of(read_ranks(model)))
            write_json(directory / CONFIG, config_of())
            return
        copy_file(model, directory)
        count_pieces(model)
    except CheckpointError as fault:
        on_event(Notice(f"{model}: {fault.what}; transformers needs a tokenizer.json beside it", "warning"))
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
    write_json(directory / CONFIG, facts)


def copy_meta_tokenizer(source: Path, directory: Path, on_event: OnEvent = ignore_event) -> None:
    """The ``tokenizer.model`` of a model directory, the one tokenizer file of Meta's format.

    That of a Llama 3 is written from its ``tokenizer.json``, where that encodes as Meta's file does.
    """
    if (source / SENTENCEPIECE_FILE).exists():
        copy_file(source / SENTENCEPIECE_FILE, directory)
        return
    definition = source / JSON_FILE
    ranks = ranks_of(read_json(definition, max_bytes=LARGEST_JSON_BYTES)) if definition.exists() else None
    if ranks is not None:
        with writing(directory / SENTENCEPIECE_FILE) as file:
            file.write(written(ranks))
    else:
        on_event(Notice(f"{source}: no tokenizer.model, which Meta's format needs: add it yourself", "warning"))
