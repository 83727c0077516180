"""Tokenizer files of one model directory in another, of the same format or of the other one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from llamatune.durable_writing import remove, writing
from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.safe_reading import open_regular
from llamatune.strict_json import read_json, write_json
from llamatune.tokenizers.added_tokens import ADDED, CONFIG, LARGEST_JSON_BYTES, ROLES
from llamatune.tokenizers.chat_templates import (
    DEFAULT,
    OLD_TEMPLATE_FILE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    TEMPLATE_KEY,
    StoredTemplate,
    read_chat_templates,
    write_template_file,
)
from llamatune.tokenizers.loading import is_tiktoken, load_tokenizer
from llamatune.tokenizers.tiktoken_file import config_of, definition_of, ranks_of, read_ranks, written
from llamatune.tokenizers.tokenizer import JSON_FILE, SENTENCEPIECE_FILE

TOKENIZER_FILES = (SENTENCEPIECE_FILE, JSON_FILE, CONFIG, ROLES, ADDED, TEMPLATE_FILE, OLD_TEMPLATE_FILE)
_LARGEST = 256 << 20
_V5_CLASS, _V4_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"


def copy_file(source: Path, directory: Path) -> None:
    """Copy one regular file byte for byte, with the umask's mode."""
    with open_regular(source, max_bytes=_LARGEST) as original, writing(directory / source.name) as copy:
        shutil.copyfileobj(original, copy)


def copy_huggingface_tokenizer(source: Path, directory: Path, on_event: OnEvent = ignore_event) -> None:
    """Every tokenizer file that transformers reads, from a model directory of either format.

    A chat template is written to both of its homes, since some readers know only one.
    """
    present = [name for name in TOKENIZER_FILES if (source / name).exists()]
    if present == [SENTENCEPIECE_FILE] and (source / "params.json").exists():
        _write_from_meta(source / SENTENCEPIECE_FILE, directory, on_event)
        return
    templates = _chat_templates(source)
    template = templates[DEFAULT].text if DEFAULT in templates else None
    for name in present:
        if name == CONFIG:
            _copy_config(source / name, directory, template, on_event)
        else:
            copy_file(source / name, directory)
    # transformers would forget templates with names in tokenizer_config.json for one in a file.
    named = any(name != DEFAULT and file.name == CONFIG for name, (_, file) in templates.items())
    if template is not None and TEMPLATE_FILE not in present and not named:
        write_template_file(directory, template)
    for file in sorted((source / TEMPLATE_FOLDER).glob("*.jinja")):
        (directory / TEMPLATE_FOLDER).mkdir(exist_ok=True)
        copy_file(file, directory / TEMPLATE_FOLDER)
    if not present:
        on_event(Notice(f"{source}: no tokenizer in it, so none is written", "warning"))


def read_chat_template(directory: Path) -> str | None:
    """The usual chat template of a directory; None: it has none, or its files cannot be read."""
    usual = _chat_templates(directory).get(DEFAULT)
    return None if usual is None else usual.text


def _chat_templates(directory: Path) -> dict[str, StoredTemplate]:
    try:
        return read_chat_templates(directory)
    except CheckpointError:  # they are copied as they are
        return {}


def replace_chat_template(directory: Path, template: str) -> None:
    """Give the tokenizer that was copied to ``directory`` another chat template. Not atomic: for staging."""
    if read_chat_template(directory) == template:
        return
    for name in (TEMPLATE_FILE, OLD_TEMPLATE_FILE):
        (directory / name).unlink(missing_ok=True)
    write_template_file(directory, template)
    config = directory / CONFIG
    if config.exists():
        facts = read_json(config, max_bytes=LARGEST_JSON_BYTES)
        config.unlink()
        write_json(config, {**facts, TEMPLATE_KEY: template})


def complete_tokenizer(directory: Path, source: Path) -> None:
    """Write the ``tokenizer_config.json`` that the tokenizer copied from ``source`` lacks.

    Without a ``config.json`` beside it, transformers cannot tell of what class the tokenizer is.
    """
    if (directory / CONFIG).exists() or not any(
        (directory / name).exists() for name in (SENTENCEPIECE_FILE, JSON_FILE)
    ):
        return
    tokenizer = load_tokenizer(source)
    pieces = tokenizer.pieces()
    facts: dict[str, Any] = {
        "tokenizer_class": _V4_CLASS if (directory / JSON_FILE).exists() else "LlamaTokenizer",
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
        "bos_token": None if tokenizer.bos_id is None else pieces[tokenizer.bos_id],
        "eos_token": pieces[tokenizer.eos_id],
        "unk_token": "<unk>" if "<unk>" in pieces else None,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        TEMPLATE_KEY: read_chat_template(directory),
    }
    write_json(directory / CONFIG, {name: value for name, value in facts.items() if value is not None})


def _default_of(stated: Any) -> Any:
    """The usual template of what ``tokenizer_config.json`` states: one text, or several with their names."""
    if not isinstance(stated, list):
        return stated
    return {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}.get(DEFAULT)


def _copy_config(source: Path, directory: Path, template: str | None, on_event: OnEvent) -> None:
    """``tokenizer_config.json``; as transformers 5 writes it, in the words that transformers 4 knows too."""
    facts = read_json(source, max_bytes=LARGEST_JSON_BYTES)
    changed: dict[str, Any] = dict(facts)
    stated = facts.get(TEMPLATE_KEY)
    if template is not None and template != _default_of(stated):
        changed[TEMPLATE_KEY] = template
        if stated is not None:
            what = f"another chat template than {TEMPLATE_FILE}, which is used, as transformers does"
            on_event(Notice(f"{source}: {what}", "warning"))
    if facts.get("tokenizer_class") == _V5_CLASS:
        changed["tokenizer_class"] = _V4_CLASS
    if isinstance(facts.get("extra_special_tokens"), list):
        listed = changed.pop("extra_special_tokens")
        changed["additional_special_tokens"] = [*(facts.get("additional_special_tokens") or []), *listed]
    if changed == facts:
        copy_file(source, directory)
    else:
        write_json(directory / source.name, changed)


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

    That of a Llama 3 is written from its ``tokenizer.json``, where that encodes as Meta's file does. The files of any
    other are copied as they are: llamatune reads them in a directory of either format.
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
        if definition.exists():
            copy_huggingface_tokenizer(source, directory, on_event)


def replace_tokenizer(source: Path, directory: Path, meta: bool, on_event: OnEvent = ignore_event) -> None:
    """Another tokenizer than the one that was copied to ``directory``. Not atomic: for staging directories."""
    for name in (*TOKENIZER_FILES, TEMPLATE_FOLDER):
        remove(directory / name)
    (copy_meta_tokenizer if meta else copy_huggingface_tokenizer)(source, directory, on_event)
