"""The tokenizer in the metadata of a GGUF file, written as the files that transformers and llamatune read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from llamatune.durable_writing import writing
from llamatune.errors import CheckpointError
from llamatune.strict_json import JsonFields, write_json
from llamatune.tokenizers.added_tokens import CONFIG
from llamatune.tokenizers.chat_templates import DEFAULT, write_chat_templates
from llamatune.tokenizers.gguf_pre_tokenizers import PreTokenizer, pre_tokenizer_called
from llamatune.tokenizers.gguf_vocabulary import BYTE_LEVEL, KEY, NONE, SENTENCEPIECE
from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.sentencepiece_proto import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    PieceModel,
    written_pieces,
)
from llamatune.tokenizers.tokenizer import JSON_FILE, SENTENCEPIECE_FILE

T = TypeVar("T")
_PADDING = re.compile(r"\[PAD\d+\]")
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def write_tokenizer(metadata: Mapping[str, Any], directory: Path, path: Path) -> None:
    """Write the tokenizer and the chat templates of the GGUF file at ``path`` into ``directory``.

    Raises:
        CheckpointError: a kind of tokenizer, or a way to split text, that is not known; a malformed one.
    """
    facts = JsonFields(path, dict(metadata))
    kind = metadata.get(f"{KEY}model", NONE)
    if kind in (NONE, "no_vocab"):
        return
    if kind not in (SENTENCEPIECE, BYTE_LEVEL):
        facts.refuse(f"{KEY}model", f"known are {SENTENCEPIECE} and {BYTE_LEVEL}")
    pieces = _pieces(facts)
    roles = {name: _token(facts, f"{KEY}{key}_token_id", pieces) for key, name in _ROLES.items()}
    try:
        if kind == SENTENCEPIECE:
            config = _write_sentencepiece(facts, pieces, roles, directory)
        else:
            config = _write_byte_level(facts, pieces, roles, directory)
        config |= {name: piece.text for name, piece in roles.items() if piece is not None}
        config |= {"clean_up_tokenization_spaces": False}
        config |= write_chat_templates(_templates(facts), directory)
        write_json(directory / CONFIG, config)
        load_tokenizer(directory)
    except CheckpointError as fault:
        todo = fault.todo or "fetch it again"
        raise CheckpointError(f"its tokenizer cannot be made again: {fault.what}", path, todo) from None


def _pieces(facts: JsonFields) -> list[Piece]:
    """The tokens, without those at the end that only fill the embedding's rows."""
    tokens = facts.raw.get(f"{KEY}tokens")
    count = len(tokens) if isinstance(tokens, list) else 0
    scores, kinds = (facts.raw.get(f"{KEY}{key}") for key in ("scores", "token_type"))
    scores = [0.0] * count if scores is None else scores
    kinds = [NORMAL] * count if kinds is None else kinds
    columns = ((tokens, (str,)), (scores, (float,)), (kinds, (int,)))
    sound = count > 0 and all(
        isinstance(column, list) and len(column) == count and all(type(value) in allowed for value in column)
        for column, allowed in columns
    )
    if not sound or not set(kinds) <= set(range(NORMAL, 7)):
        raise CheckpointError(f"malformed: {KEY}tokens, scores or token_type", facts.path, "fetch it again")
    pieces = [Piece(*entry) for entry in zip(tokens or (), scores, kinds, strict=True)]
    while pieces and pieces[-1].kind == UNUSED and _PADDING.fullmatch(pieces[-1].text):
        pieces.pop()
    return pieces


def _token(facts: JsonFields, key: str, pieces: list[Piece]) -> Piece | None:
    if facts.raw.get(key) is None:
        return None
    token_id = facts.integer(key)
    if not 0 <= token_id < len(pieces):
        facts.refuse(key, f"there are {len(pieces)} tokens")
    return pieces[token_id]


def _puts_bos(facts: JsonFields, default: bool) -> bool:
    if facts.flag(f"{KEY}add_eos_token", False):
        facts.refuse(f"{KEY}add_eos_token", "EOS is never put after a prompt")
    return facts.flag(f"{KEY}add_bos_token", default)


def _write_sentencepiece(
    facts: JsonFields, pieces: list[Piece], roles: Mapping[str, Piece | None], directory: Path
) -> dict[str, Any]:
    """The model up to its last plain piece; what comes behind are tokens that were added to it."""
    last = max((n for n, piece in enumerate(pieces) if piece.kind not in (CONTROL, USER_DEFINED)), default=-1)
    own = [
        Piece(piece.text.replace(" ", "▁"), piece.score, piece.kind) if piece.kind == USER_DEFINED else piece
        for piece in pieces[: last + 1]
    ]
    charsmap = _listed(facts, f"{KEY}precompiled_charsmap", int)
    bos, eos, unknown = (
        roles[name] if roles[name] in own else None for name in ("bos_token", "eos_token", "unk_token")
    )
    unknown = unknown or next((piece for piece in own if piece.kind == UNKNOWN), None)
    model = PieceModel(
        own,
        unknown=unknown.text if unknown else "<unk>",
        bos=bos.text if bos else "<s>",
        eos=eos.text if eos else "</s>",
        charsmap=bytes(number & 0xFF for number in charsmap),
        dummy_prefix=facts.flag(f"{KEY}add_space_prefix", True),
        remove_extra_whitespaces=facts.flag(f"{KEY}remove_extra_whitespaces", False),
    )
    with writing(directory / SENTENCEPIECE_FILE) as file:
        file.write(written_pieces(model))
    added = {
        str(number): {"content": piece.text, "special": piece.kind == CONTROL, **_plain()}
        for number, piece in enumerate(pieces)
        if piece.kind in (CONTROL, UNKNOWN) or number > last
    }
    bos_flags = {"add_bos_token": _puts_bos(facts, True), "add_eos_token": False}
    return {"tokenizer_class": "LlamaTokenizer", "legacy": True, **bos_flags, "added_tokens_decoder": added}


def _plain() -> dict[str, bool]:
    return {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def _write_byte_level(
    facts: JsonFields, pieces: list[Piece], roles: Mapping[str, Piece | None], directory: Path
) -> dict[str, Any]:
    known = pre_tokenizer_called(facts.raw.get(f"{KEY}pre", "default"), facts.path)
    merges = _listed(facts, f"{KEY}merges", str)
    if not all(merge.count(" ") == 1 for merge in merges):
        raise CheckpointError(f"malformed: {KEY}merges", facts.path, "fetch it again")
    added = [
        {"id": number, "content": piece.text, "special": piece.kind != USER_DEFINED, **_plain()}
        for number, piece in enumerate(pieces)
        if piece.kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    last = max((n for n, piece in enumerate(pieces) if piece.kind in (NORMAL, UNUSED)), default=-1)
    bos = roles["bos_token"] if _puts_bos(facts, known.adds_bos) else None
    definition = _definition(pieces[: last + 1], merges, known) | {"added_tokens": added}
    if bos is not None:
        definition["post_processor"] = _beginning(bos.text, pieces.index(bos))
    write_json(directory / JSON_FILE, definition)
    return {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}


def _definition(pieces: list[Piece], merges: list[str], known: PreTokenizer) -> dict[str, Any]:
    vocabulary = {piece.text: number for number, piece in enumerate(pieces)}
    parts = known.parts()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "NFC"} if known.composes else None,
        "pre_tokenizer": parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": known.whole_words,
            "vocab": vocabulary,
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _beginning(text: str, token_id: int) -> dict[str, Any]:
    """The post-processor that puts a BOS before a text."""
    special = {"SpecialToken": {"id": text, "type_id": 0}}
    sequences = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    second = {"SpecialToken": {"id": text, "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special, sequences[0]],
        "pair": [special, sequences[0], second, sequences[1]],
        "special_tokens": {text: {"id": text, "ids": [token_id], "tokens": [text]}},
    }


def _templates(facts: JsonFields) -> dict[str, str]:
    names = _listed(facts, "tokenizer.chat_templates", str)
    keys = {DEFAULT: "tokenizer.chat_template"} | {name: f"tokenizer.chat_template.{name}" for name in names}
    found = {name: facts.raw[key] for name, key in keys.items() if facts.raw.get(key) is not None}
    if not all(isinstance(text, str) for text in found.values()):
        raise CheckpointError("malformed: its chat template is no text", facts.path, "fetch it again")
    return found


def _listed(facts: JsonFields, key: str, kind: type[T]) -> list[T]:
    """The values of a list; none if the key is absent."""
    values = facts.raw.get(key, [])
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise CheckpointError(f"malformed: {key}", facts.path, "fetch it again")
    return values
