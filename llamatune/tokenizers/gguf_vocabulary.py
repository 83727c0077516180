"""The tokenizer of a model directory as the metadata of a GGUF file (``tokenizer.ggml.*``), as llama.cpp reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.events import Notice, OnEvent, ignore_event
from llamatune.strict_json import read_json
from llamatune.tokenizers.added_tokens import LARGEST_JSON_BYTES, TokenizerFiles, vocabulary_of
from llamatune.tokenizers.chat_templates import DEFAULT, read_chat_templates
from llamatune.tokenizers.gguf_pre_tokenizers import pre_tokenizer_name
from llamatune.tokenizers.loading import is_tiktoken, load_tokenizer, tokenizer_file
from llamatune.tokenizers.sentencepiece_proto import (
    BPE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Piece,
    PieceModel,
    read_pieces,
)
from llamatune.tokenizers.tiktoken_file import definition_of, read_ranks
from llamatune.tokenizers.tokenizer import JSON_FILE, SENTENCEPIECE_FILE, Tokenizer, check_vocabulary

Entries = dict[str, tuple[str, Any]]
KEY = "tokenizer.ggml."
SENTENCEPIECE, BYTE_LEVEL, NONE = "llama", "gpt2", "none"
"""``tokenizer.ggml.model`` of SentencePiece's BPE, of byte-level BPE, and of a model without a tokenizer."""
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0


def vocabulary_entries(
    directory: Path, rows: int, end_tokens: Sequence[int], on_event: OnEvent = ignore_event
) -> Entries:
    """The keys of the tokenizer and the chat templates in ``directory``.

    Args:
        rows: of the embedding, which has a token for each.
        end_tokens: those that end a text or a turn in the model's configuration.

    Raises:
        CheckpointError: a tokenizer that llama.cpp has no name for, or one that does not fit the model.
    """
    file = tokenizer_file(directory)
    if file is None:
        on_event(Notice(f"{directory}: no tokenizer in it, so the GGUF file has none and takes no text", "warning"))
        return {f"{KEY}model": ("str", NONE)}
    tokenizer = load_tokenizer(directory, on_event)
    check_vocabulary(tokenizer, rows, directory)
    files = TokenizerFiles(directory)
    entries = _sentencepiece(file, tokenizer, files, rows, on_event)
    if entries is None:
        entries = _byte_level(file, tokenizer, files, rows, on_event)
    entries |= _special_ids(tokenizer, end_tokens, directory, on_event)
    for role, name in (("bos_token", "bos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        named = files.role(role)
        if named is not None and (token_id := _id_of(named[0], entries)) is not None:
            entries.setdefault(f"{KEY}{name}_token_id", ("u32", token_id))
    templates = read_chat_templates(directory)
    for name, (text, _) in templates.items():
        entries["tokenizer.chat_template" if name == DEFAULT else f"tokenizer.chat_template.{name}"] = ("str", text)
    if others := [name for name in templates if name != DEFAULT]:
        entries["tokenizer.chat_templates"] = ("[str]", others)
    return entries


def _sentencepiece(
    file: Path, tokenizer: Tokenizer, files: TokenizerFiles, rows: int, on_event: OnEvent
) -> Entries | None:
    """A SentencePiece model, and the tokens that were added to it; None: the file is another."""
    from llamatune.tokenizers.sentencepiece import SentencePieceTokenizer  # importing the library takes 40 ms
    from llamatune.tokenizers.sentencepiece_check import read_checked

    if not isinstance(tokenizer, SentencePieceTokenizer):
        return None
    try:
        model = read_pieces(read_checked(file))
    except UnicodeDecodeError:
        raise CheckpointError("not a sound SentencePiece model: a piece is not UTF-8", file, "fetch it again") from None
    except ValueError as fault:
        raise CheckpointError(f"not a sound SentencePiece model: {fault}", file, "fetch it again") from None
    if model.kind != BPE or model.spaces_are_suffixes or not model.escape_whitespaces:
        kind = "its spaces are suffixes" if model.kind == BPE else "a Unigram model"
        raise CheckpointError(f"{kind}, which llama.cpp does not encode as LLaMA's", file, "choose --format hf")
    if model.charsmap or model.remove_extra_whitespaces:
        what = "it normalises text before it is encoded; the GGUF file says so, but llama.cpp does not do it"
        on_event(Notice(f"{file}: {what}", "warning"))
    pieces = [
        Piece(piece.text.replace("▁", " "), piece.score, piece.kind) if piece.kind == USER_DEFINED else piece
        for piece in model.pieces
    ]
    pieces += map(_padding, range(len(pieces), rows))
    for token in files.tokens:
        if token.id is not None and len(model.pieces) <= token.id < rows:
            special = token.is_special or token.text in tokenizer.special_ids
            text = token.text.replace("▁", " ") if token.normalized else token.text
            pieces[token.id] = Piece(text, _ADDED_SCORE, CONTROL if special else USER_DEFINED)
    return _tokens(SENTENCEPIECE, "default", pieces) | _normalizer(model)


def _normalizer(model: PieceModel) -> Entries:
    entries: Entries = {f"{KEY}add_space_prefix": ("bool", model.dummy_prefix)}
    if model.remove_extra_whitespaces:
        entries[f"{KEY}remove_extra_whitespaces"] = ("bool", True)
    if model.charsmap:
        entries[f"{KEY}precompiled_charsmap"] = ("[u8]", list(model.charsmap))
    unknown = next((n for n, piece in enumerate(model.pieces) if piece.text == model.unknown), None)
    return entries if unknown is None else entries | {f"{KEY}unknown_token_id": ("u32", unknown)}


def _byte_level(file: Path, tokenizer: Tokenizer, files: TokenizerFiles, rows: int, on_event: OnEvent) -> Entries:
    """A ``tokenizer.json`` or tiktoken's file of byte-level BPE."""
    tiktoken = file.name == SENTENCEPIECE_FILE and is_tiktoken(file)
    raw = definition_of(read_ranks(file)) if tiktoken else read_json(file, max_bytes=LARGEST_JSON_BYTES)
    if tiktoken:
        files = TokenizerFiles(file.parent, (), {JSON_FILE: raw})
    name = pre_tokenizer_name(raw, file, on_event)
    pieces = [_padding(number) for number in range(rows)]
    for text, token_id in vocabulary_of(raw):
        pieces[token_id] = Piece(text, 0.0, NORMAL)
    for token in files.tokens:
        if token.id is not None and token.id < rows:
            pieces[token.id] = Piece(token.text, 0.0, CONTROL if token.is_special else USER_DEFINED)
    for text, token_id in tokenizer.special_ids.items():
        pieces[token_id] = Piece(text, 0.0, CONTROL)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in raw["model"]["merges"]]
    if any(merge.count(" ") != 1 for merge in merges):
        raise CheckpointError("a merge of tokens with spaces, which GGUF cannot say", file, "choose --format hf")
    entries = _tokens(BYTE_LEVEL, name, pieces)
    del entries[f"{KEY}scores"]
    return entries | {f"{KEY}merges": ("[str]", merges)}


def _tokens(model: str, pre: str, pieces: Sequence[Piece]) -> Entries:
    return {
        f"{KEY}model": ("str", model),
        f"{KEY}pre": ("str", pre),
        f"{KEY}tokens": ("[str]", [piece.text for piece in pieces]),
        f"{KEY}scores": ("[f32]", [piece.score for piece in pieces]),
        f"{KEY}token_type": ("[i32]", [piece.kind for piece in pieces]),
    }


def _padding(number: int) -> Piece:
    """An id without a token, so that there are as many as the embedding has rows."""
    return Piece(f"[PAD{number}]", _PADDING_SCORE, UNUSED)


def _special_ids(tokenizer: Tokenizer, end_tokens: Sequence[int], directory: Path, on_event: OnEvent) -> Entries:
    """BOS, EOS, and further ends of a text under the two keys that there are for them."""
    entries: Entries = {}
    if tokenizer.bos_id is not None:
        entries[f"{KEY}bos_token_id"] = ("u32", tokenizer.bos_id)
    entries[f"{KEY}eos_token_id"] = ("u32", tokenizer.eos_id)
    for token_id in end_tokens:
        if token_id == tokenizer.eos_id:
            continue
        of_message = "eom" in tokenizer.piece(token_id) if token_id < tokenizer.vocab_size else False
        key = f"{KEY}{'eom' if of_message or f'{KEY}eot_token_id' in entries else 'eot'}_token_id"
        if key in entries:
            on_event(Notice(f"{directory}: GGUF has no key for a further end of a text, {token_id}", "warning"))
        else:
            entries[key] = ("u32", token_id)
    entries[f"{KEY}add_bos_token"] = ("bool", tokenizer.bos_id is not None)
    entries[f"{KEY}add_eos_token"] = ("bool", False)
    return entries


def _id_of(text: str, entries: Entries) -> int | None:
    tokens: list[str] = entries[f"{KEY}tokens"][1]
    return tokens.index(text) if text in tokens else None
