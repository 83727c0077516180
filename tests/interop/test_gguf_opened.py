"""GGUF files of `convert`, opened by llama.cpp: the same model, tokens, chats and ends of text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from asking import Answer, Question, ask
from bases import LLAMA_3_ROPE, MEMBERS
from computing import CHATS, Computed, compute, without_end, worst_difference
from hard_texts import HARD_TEXTS
from transformers import AutoTokenizer

from llamatune.checkpoints.converting import convert
from llamatune.command_options.conversion import ConvertOptions
from llamatune.tokenizers.loading import load_tokenizer

pytestmark = pytest.mark.interop
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
"""What Q8_0's blocks of 32 fill."""
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("sentencepiece", {}),
    "llama-3": ("llama3", {"rope_parameters": {**LLAMA_3_ROPE, "original_max_position_embeddings": 16}}),
    "tied": ("smollm", {"tie_word_embeddings": True}),
    "linear": ("sentencepiece", MEMBERS["linear"]),
    "yarn": ("sentencepiece", MEMBERS["yarn"]),
    "yarn of its own factors": ("sentencepiece", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "biases": ("smollm", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("sentencepiece", {"model_type": "mistral", "sliding_window": None}),
    "qwen2": ("smollm", {"model_type": "qwen2"}),
    "qwen3": ("thinking", {"model_type": "qwen3", "head_dim": 16}),
}
"""A tokenizer's kind, and what the configuration says."""
ROUNDED = {"float16": 0.02, "bfloat16": 0.1, "q8_0": 0.5}
"""The greatest difference from the rounded model: llama.cpp rounds what it multiplies with, too."""


@pytest.fixture(scope="module")
def base(
    tiny_base: Callable[..., Path],
    tokenizer_models: dict[str, Path],
    chat_tokenizers: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    scratch = tmp_path_factory.mktemp("gguf-bases")

    def make(name: str, kind: str, changes: dict[str, Any]) -> Path:
        path = tokenizer_models["bpe"] if kind == "sentencepiece" else chat_tokenizers[kind]
        tokenizer = load_tokenizer(path)
        ends = {"bos_token_id": tokenizer.bos_id or 1, "eos_token_id": tokenizer.eos_id}
        shutil.copytree(tiny_base(vocab_size=520, **ends, **changes), scratch / name)
        (scratch / name / "tokenizer.model").unlink()
        if kind == "sentencepiece":
            shutil.copy(path, scratch / name / "tokenizer.model")
        else:
            shutil.copytree(path, scratch / name, dirs_exist_ok=True)
        return scratch / name

    return make


@pytest.fixture(scope="module")
def opened(
    base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Computed, Answer]]:
    """The base, what llamatune computes of it, and what llama.cpp says of its GGUF file, by name."""
    folder = tmp_path_factory.mktemp("gguf")
    paths = {name: base(name, *model) for name, model in MODELS.items()}
    computed = {name: compute(path) for name, path in paths.items()}
    for name, dtype in [*((name, "same") for name in MODELS), *((dtype, dtype) for dtype in ROUNDED)]:
        source = paths[name] if name in paths else base(name, "sentencepiece", WIDE)
        convert(ConvertOptions(source, folder / f"{name}.gguf", dtype=dtype))
        if name in ROUNDED:
            convert(ConvertOptions(folder / f"{name}.gguf", folder / name, dtype="float32"))
            paths[name], computed[name] = source, compute(folder / name)
    questions = {
        name: Question(
            folder / f"{name}.gguf", None, computed[name].ids, HARD_TEXTS,
            CHATS if MODELS.get(name, ("sentencepiece",))[0] != "sentencepiece" else [],
        )
        for name in paths
    }  # fmt: skip
    answers = ask("llama.cpp", questions)
    return {name: (path, computed[name], answers[name]) for name, path in paths.items()}


@pytest.mark.parametrize("name", [*MODELS, *ROUNDED])
def test_llama_cpp_computes_the_same(opened, name, note):
    _, computed, answer = opened[name]
    worst = worst_difference(answer, computed)
    note(f"llama.cpp {answer['release']}, GGUF: {name}", worst)
    assert worst < ROUNDED.get(name, 1e-4)
    assert answer["theta"] == computed.theta
    if name in MODELS:
        assert [without_end(row, computed) for row in answer["greedy"]] == computed.greedy


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_reads_texts_and_chats_the_same(opened, name):
    path, _, answer = opened[name]
    tokenizer = load_tokenizer(path)
    assert [text for text, ids in zip(HARD_TEXTS, answer["texts"], strict=True) if ids != tokenizer.encode(text)] == []
    if MODELS[name][0] != "sentencepiece":
        base = AutoTokenizer.from_pretrained(path)
        assert answer["chats"] == [
            base.apply_chat_template(chat, tokenize=False, add_generation_prompt=chat[-1]["role"] != "assistant")
            for chat in CHATS
        ]
