"""The ``tokenizer.model`` of Meta's Llama 3: tiktoken's ranks, turned into the definition of a ``tokenizer.json``.

A line is a token's bytes in base64 and its rank, which is its id. Pattern and special tokens are not in the file; they
are those of Meta's reference code (``tokenizer.py`` of llama3 and llama-models).
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from llamatune.errors import CheckpointError
from llamatune.safe_reading import read_bytes
from llamatune.tokenizers.byte_level import bytes_of, spelled

LARGEST_TIKTOKEN_BYTES = 16 << 20
"""That of Llama 3 has 2.2 MB."""

_LONGEST_TOKEN = 256
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
_SPECIALS = (
    BOS, EOS, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
    "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
SPECIALS = 256


def special_tokens() -> list[str]:
    """Those of Llama 3.1 and later, in the ids' order; Llama 3 has the same ids, some of them reserved."""
    return [*_SPECIALS, *(f"<|reserved_special_token_{n}|>" for n in range(2, 2 + SPECIALS - len(_SPECIALS)))]


def read_ranks(path: Path) -> dict[bytes, int]:
    """Each token's rank, in the ranks' order.

    Raises:
        CheckpointError: a malformed line, ranks that are not 0 to n-1, a token twice, a byte without a token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path, max_bytes=LARGEST_TIKTOKEN_BYTES).split(b"\n"), 1):
        if not line.strip():
            continue
        parts = line.split()
        try:
            text, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (binascii.Error, ValueError, IndexError):
            raise CheckpointError("not a token in base64 and its rank", f"{path}:{number}", "fetch it again") from None
        if len(parts) != 2 or not 0 < len(text) <= _LONGEST_TOKEN or text in ranks or rank != len(ranks):
            what = f"rank {rank} where {len(ranks)} is expected, or a token that is empty, too long or there twice"
            raise CheckpointError(what, f"{path}:{number}", "fetch it again")
        ranks[text] = rank
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        what = f"a tiktoken file without a token for {len(lacking)} of the 256 bytes, 0x{lacking[0]:02X} first"
        raise CheckpointError(what, path, "fetch it again")
    return ranks


def definition_of(ranks: dict[bytes, int]) -> dict[str, Any]:
    """The ``tokenizer.json`` that encodes as tiktoken does.

    tiktoken joins the neighbours whose joined token has the lowest rank. As merges these are all splits of each token
    into two tokens, in the order of its rank.
    """
    names, merges = [spelled(token) for token in ranks], []
    for token in ranks:
        splits = [(ranks[token[:n]], ranks.get(token[n:])) for n in range(1, len(token)) if token[:n] in ranks]
        known = sorted((left, right) for left, right in splits if right is not None)
        merges += [[names[left], names[right]] for left, right in known]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": len(ranks) + n, "content": text, **flags} for n, text in enumerate(special_tokens())]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    parts = ({"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}})
    second = ({"SpecialToken": {"id": BOS, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*parts],
            "pair": [*parts, *second],
            "special_tokens": {BOS: {"id": BOS, "ids": [len(ranks)], "tokens": [BOS]}},
        },
        "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {name: rank for rank, name in enumerate(names)},
            "merges": merges,
        },
    }


def ranks_of(definition: dict[str, Any]) -> dict[bytes, int] | None:
    """The ranks of a ``tokenizer.json`` that ``definition_of`` would make of them; None: it is of another kind."""
    try:
        vocabulary = sorted(definition["model"]["vocab"].items(), key=lambda item: item[1])
        ranks = {bytes_of(text): rank for text, rank in vocabulary}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in definition["model"]["merges"]]
        added = sorted(token["id"] for token in definition["added_tokens"])
        if added != list(range(len(ranks), len(ranks) + SPECIALS)) or definition["model"]["type"] != "BPE":
            return None
        made = definition_of(ranks)
        same = made["model"] | {"vocab": dict(vocabulary), "merges": merges} == made["model"]
        same &= definition["model"]["ignore_merges"] is True and definition["normalizer"] is None
        split = definition["pre_tokenizer"]["pretokenizers"][0]
        return ranks if same and split == made["pre_tokenizer"]["pretokenizers"][0] else None
    except (AttributeError, LookupError, TypeError):
        return None


def written(ranks: dict[bytes, int]) -> bytes:
    """tiktoken's file of these ranks."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def config_of() -> dict[str, Any]:
    """The ``tokenizer_config.json`` that belongs to ``definition_of``."""
    return {
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
