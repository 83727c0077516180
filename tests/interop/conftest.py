"""Outputs of llamatune, and the answers of each judge about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from asking import Answer, Question, ask, to_gguf
from bases import OUTPUTS, make_bases
from computing import CHATS, Computed, compute
from hard_texts import HARD_TEXTS
from trained_tokenizers import tiktoken_file

from llamatune.checkpoints.merging import merge_lora
from llamatune.command_options.inference import MergeOptions

_figures: dict[str, float] = {}


@dataclass(frozen=True)
class Output:
    """A model directory that llamatune wrote, the base it was made of, and what llamatune computes of it."""

    path: Path
    base: Path
    computed: Computed


@pytest.fixture(scope="session")
def bases(tiny_base, meta_copy, tokenizer_models, json_tokenizers, tmp_path_factory) -> dict[str, Path]:
    scratch = tmp_path_factory.mktemp("bases")
    return make_bases(tiny_base, meta_copy, tokenizer_models["bpe"], json_tokenizers, scratch)


@pytest.fixture(scope="session")
def merged(peft_adapter, bases, tmp_path_factory) -> Callable[..., Path]:
    """A base with an adapter of PEFT's merged into it, as Hugging Face's directory where no other format is named."""
    scratch = tmp_path_factory.mktemp("merged")

    def make(base: Path, name: str, r: int = 5, format_: str = "hf") -> Path:
        adapter = peft_adapter(bases["llama-2"], r=r)
        merge_lora(MergeOptions(base, adapter, scratch / name, format_, force_base=True))
        return scratch / name

    return make


@pytest.fixture(scope="session")
def outputs(bases, merged, json_tokenizers) -> dict[str, Output]:
    """Merges of every base, and of a Llama 3 in Meta's format, with tiktoken's file."""
    meta = merged(bases["llama-3 without tokenizer"], "llama-3 in Meta's format", format_="meta")
    (meta / "tokenizer.model").write_bytes(tiktoken_file(json_tokenizers["llama_3"]))
    known = bases | {"llama-3 of Meta": meta}
    made = {name: (merged(known[name], name, r=3), known[name]) for name in OUTPUTS if name in known}
    return {name: Output(path, base, compute(path)) for name, (path, base) in made.items()}


@pytest.fixture(scope="session")
def answers(outputs, tmp_path_factory) -> Callable[[str], dict[str, Answer]]:
    """What a judge says of every output; it is asked once."""
    known: dict[str, dict[str, Answer]] = {}
    ggufs = tmp_path_factory.mktemp("gguf")

    def of(judge: str) -> dict[str, Answer]:
        if judge not in known:
            paths = {name: output.path for name, output in outputs.items()}
            if judge == "llama.cpp":  # whose converter knows published tokenizers alone
                models = {name: path for name, path in paths.items() if is_sentencepiece(path)}
                paths = {name: ggufs / f"{name}.gguf" for name in models}
                to_gguf({models[name]: file for name, file in paths.items()})
            questions = {}
            for name, path in paths.items():
                output = outputs[name]
                chats = CHATS if (output.path / "chat_template.jinja").exists() else []
                texts = HARD_TEXTS if any(output.path.glob("tokenizer.*")) else []
                questions[name] = Question(path, None, output.computed.ids, texts, chats)
            known[judge] = ask(judge, questions)
        return known[judge]

    return of


def is_sentencepiece(path: Path) -> bool:
    return (path / "tokenizer.model").exists() and not (path / "tokenizer.json").exists()


@pytest.fixture(scope="session")
def note() -> Callable[[str, float], None]:
    """Keep a figure for the table at the end."""
    return _figures.__setitem__


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _figures:
        terminalreporter.section("greatest differences of logits")
        for name, figure in sorted(_figures.items()):
            terminalreporter.write_line(f"{figure:.1e}  {name}")
