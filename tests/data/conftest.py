"""Small tokenizers trained on the spot, and short ways to write rows and prepare them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from llamatune.data.prepare import PrepareOptions, PrepareReport, prepare_data
from llamatune.data.tokenizer import Tokenizer, load_tokenizer

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
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
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
def tokenizer(models: dict[str, Path]) -> Tokenizer:
    return load_tokenizer(models["bpe"])


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (objects, or lines as they are) as JSON Lines."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_bytes("".join(line + "\n" for line in lines).encode())
        return path

    return write


@pytest.fixture
def prepare(tmp_path: Path, models: dict[str, Path]) -> Callable[..., PrepareReport]:
    """Prepare one file into ``tmp_path / "out"``, with options by name."""

    def run(rows: Path | list[Path], **options: Any) -> PrepareReport:
        options.setdefault("tokenizer", models["bpe"])
        options.setdefault("output", tmp_path / "out")
        workers = options.pop("workers", None)
        files = rows if isinstance(rows, list) else [rows]
        extra = {name: options.pop(name) for name in ("on_event", "should_stop") if name in options}
        return prepare_data(PrepareOptions(rows=files, **options), workers=workers, **extra)

    return run


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The shared fixtures with LLaMA's real tokenizer and real rows; tests that want them skip without."""
    default = Path(__file__).parents[2].parent / "shared" / "fixtures"
    path = Path(os.environ.get("LLAMATUNE_FIXTURES", default))
    if not path.is_dir():
        pytest.skip(f"no fixtures at {path} (set LLAMATUNE_FIXTURES)")
    return path
