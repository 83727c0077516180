"""Fixtures: small SentencePiece models of several kinds, trained when a test first needs them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llamatune.tokenizers.loading import load_tokenizer
from llamatune.tokenizers.sentencepiece import SentencePieceTokenizer

WORDS = """
below is an instruction that describes a task write response appropriately completes the request question answer llama
river stone seven walks over green hills and counts three apples in its basket while rain falls
""".split()  # noqa: SIM905


def _text(lines: int) -> list[str]:
    chance = random.Random(7)
    made = []
    for _ in range(lines):
        words = [chance.choice(WORDS) for _ in range(chance.randint(3, 12))]
        words[0] = words[0].capitalize()
        made.append(" ".join(words) + chance.choice([".", "?", ":", f" {chance.randint(0, 999)}"]))
    return made


def _train(directory: Path, name: str, **options: Any) -> Path:
    settings: dict[str, Any] = {
        "vocab_size": 512,
        "byte_fallback": True,
        "character_coverage": 0.999,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_text(600)), model_prefix=str(directory / name), **{**settings, **options}
    )
    return directory / f"{name}.model"


@pytest.fixture(scope="session")
def tokenizer_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LLaMA's kind of tokenizer (``bpe``) and others that SentencePiece can make."""
    directory = tmp_path_factory.mktemp("tokenizers")
    return {
        "bpe": _train(directory, "bpe", model_type="bpe"),
        "unigram": _train(directory, "unigram", model_type="unigram"),
        "normalising": _train(
            directory,
            "normalising",
            model_type="unigram",
            normalization_rule_name="nmt_nfkc",
            remove_extra_whitespaces=True,
        ),
        "suffix": _train(directory, "suffix", model_type="bpe", treat_whitespace_as_suffix=True),
        "no_eos": _train(directory, "no_eos", model_type="bpe", eos_id=-1),
    }


@pytest.fixture(scope="session")
def tokenizer(tokenizer_models: dict[str, Path]) -> SentencePieceTokenizer:
    return load_tokenizer(tokenizer_models["bpe"])
