"""The prompts in ``examples/prompts`` and the page about generation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamatune.command_options.generation import GenerateOptions
from llamatune.command_options.option import option_fields

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples" / "prompts").iterdir())


@pytest.mark.parametrize("template", ["none", "alpaca", "llama2-chat"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_example_prompt_is_completed(
    command: Callable[..., Any], tiny_base: Callable[..., Path], path: Path, template: str
) -> None:
    """As base models and tuned ones are asked, one prompt a row, without a warning."""
    base = tiny_base(vocab_size=90, max_position_embeddings=4096)
    words = ("--prompt-file", path, "--max-new-tokens", 2, "--template", template)
    done = command("generate", "--model", base, *words, "--json")
    assert (done.code, "warning" in done.stderr) == (0, False), done.stderr
    results = json.loads(done.stdout)["results"]
    lines = path.read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line) if path.suffix == ".jsonl" else line for line in lines]
    assert len(results) == len(asked) == {"completions.jsonl": 4, "instructions.txt": 8}[path.name]
    for result, prompt in zip(results, asked, strict=True):
        assert prompt in result["prompt"]
        assert (result["prompt"] == prompt) == (template == "none")
        assert result["completion_ids"] or result["finish_reason"] == "eos"


def test_the_page_lists_every_option_of_generate() -> None:
    page = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    listed = re.findall(r"--[a-z-]+", "".join(line.split("|")[1] for line in page.splitlines() if line[:3] == "| `"))
    assert sorted(listed) == sorted(["--json", *(option.flag for option in option_fields(GenerateOptions))])
    assert len(page.splitlines()) <= 84
