"""An adapter with tokens that its base has not: its own tokenizer is used, and belongs to what is merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamatune.tokenizers.loading import load_tokenizer

NEW = "zebra"


@pytest.fixture
def base(tiny_base: Callable[..., Path], tiny_tokenizer: Path) -> Path:
    """With a row for each piece."""
    return tiny_base(vocab_size=len(load_tokenizer(tiny_tokenizer).pieces()))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """Of the base with a row more, with the token of that row beside it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    count = len(load_tokenizer(base).pieces())
    model.resize_token_embeddings(count + 1, mean_resizing=False)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    torch.manual_seed(3)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    shutil.copy(base / "tokenizer.model", tmp_path / "adapter")
    (tmp_path / "adapter" / "added_tokens.json").write_text(json.dumps({NEW: count}))
    return tmp_path / "adapter"


def test_prompts_are_encoded_with_the_adapters_tokenizer(
    base: Path, adapter: Path, command: Callable[..., Any], tmp_path: Path
) -> None:
    asked = ("--prompt", f"a red {NEW}", "--temperature", 0, "--max-new-tokens", 4, "--json")
    model: tuple[Any, ...] = ("--model", base, "--adapter", adapter)
    tuned = command("generate", *model, *asked)
    assert tuned.code == 0, tuned.stderr
    assert command("merge-lora", *model, "--output", tmp_path / "merged").code == 0
    merged = command("generate", "--model", tmp_path / "merged", *asked)
    assert merged.code == 0, merged.stderr
    first, second = (json.loads(outcome.stdout)["results"] for outcome in (tuned, merged))
    assert first == second
    assert load_tokenizer(tmp_path / "merged").encode(NEW)[-1] == len(load_tokenizer(base).pieces())


def test_a_token_that_the_base_has_not_is_not_compared(base: Path, adapter: Path, command: Callable[..., Any]) -> None:
    model: tuple[Any, ...] = ("--model", base, "--adapter", adapter, "--compare", "--max-new-tokens", 2)
    refused = command("generate", *model, "--prompt", f"a red {NEW}")
    assert (refused.code, "leave out --compare" in refused.stderr) == (3, True)
    assert command("generate", *model, "--prompt", "a red").code == 0
