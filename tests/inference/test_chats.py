"""Chats from rows to answers: the template travels with the adapter, and its turns end what is generated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trained_tokenizers import SMOLLM_CHAT

Command = Callable[..., Any]
SAID = [
    ("what is red", "a llama"), ("and blue", "nine apples"), ("what falls", "cold rain"), ("over what", "green hills"),
]  # fmt: skip


def _row(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


def _json(outcome: Any) -> Any:
    assert outcome.code == 0, outcome.stderr
    return json.loads(outcome.stdout)


@pytest.fixture(scope="module")
def model(tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with ChatML's tokens beside SentencePiece's; its EOS is ``</s>``, which its template never writes."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_base(), directory)
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 100, "<|im_end|>": 101}))
    config = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": SMOLLM_CHAT}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_answers_end_where_the_templates_turns_end(command: Command, model: Path, tmp_path: Path) -> None:
    rows = [_row(*SAID[0], *SAID[1]), _row(*SAID[2], *SAID[3])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("prepare-data", tmp_path / "rows.jsonl", "--tokenizer", model, "--output", tmp_path / "data")
    report = _json(command(*words, "--json", "--preview", 1))
    assert (report["template"]["chat_template"], report["prompts_not_prefix"]) == (SMOLLM_CHAT, 0)
    spec = {
        "model": {"path": str(model)},
        "data": {"train": str(tmp_path / "data")},
        "lora": {"r": 16, "alpha": 32, "target_modules": "all-linear", "dropout": 0},
        "training": {
            "max_steps": 50, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2,
            "precision": "fp32", "output_dir": str(tmp_path / "run"),
        },
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(spec))
    assert command("train", tmp_path / "run.yaml").code == 0
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "llamatune.json").read_text())["facts"]["template"] == report["template"]
    asked = [_row(*SAID[0], SAID[1][0]), _row(SAID[2][0]), _row(*SAID[2], *SAID[3])]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (model / "tokenizer_config.json").rename(tmp_path / "config.json")  # what was stored is used
    config = json.loads((tmp_path / "config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ 'another' }}"}))
    greedy = ("--temperature", 0, "--max-new-tokens", 30, "--json")
    words = ("generate", "--model", model, "--adapter", adapter, "--prompt-file", tmp_path / "asked.json")
    results = _json(command(*words, *greedy))["results"]
    assert [result["completion"].strip() for result in results] == [SAID[1][1], SAID[2][1], SAID[3][1]]
    assert {result["finish_reason"] for result in results} == {"eos"}
    first = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nwhat is red<|im_end|>\n<|im_start|>assistant\n"
    assert results[0]["prompt"].startswith(first + "a llama<|im_end|>\n<|im_start|>user\nand blue<|im_end|>\n")
    tokens = report["preview"][0]["tokens"]
    trained = [token["piece"] for token in tokens if token["trained"]]
    assert (trained.count("<|im_end|>"), trained[-1]) == (2, "<|im_end|>")
    (tmp_path / "config.json").replace(model / "tokenizer_config.json")
    plain = _json(command("generate", "--model", model, "--adapter", adapter, "--prompt", SAID[2][0], *greedy))
    assert {"row": 2, **plain["results"][0]} == results[1], "a plain prompt is a user's turn"
    words = ("merge-lora", "--model", model, "--adapter", adapter, "--output", tmp_path / "merged")
    assert command(*words).code == 0
    merged = _json(command("generate", "--model", tmp_path / "merged", "--prompt", SAID[2][0], *greedy))
    assert merged["results"][0]["completion"].strip() == SAID[2][1]


def test_a_base_that_is_asked_chats_uses_its_own_template(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "asked.json").write_text(json.dumps([_row("what is red")]))
    words = ("generate", "--model", model, "--max-new-tokens", 1, "--temperature", 0, "--prompt-file")
    outcome = command(*words, tmp_path / "asked.json", "--json")
    prompt = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nwhat is red<|im_end|>\n<|im_start|>assistant\n"
    assert _json(outcome)["results"][0]["prompt"] == prompt
    assert "chats are put in the model's own template" in outcome.stderr
    named = command(*words, tmp_path / "asked.json", "--json", "--template", "model")
    assert _json(named)["results"] == _json(outcome)["results"]
    outcome = command(*words, tmp_path / "asked.json", "--template", "none")
    assert (outcome.code, "name a template with --template" in outcome.stderr) == (3, True)
    (tmp_path / "plain.txt").write_text("what is red\n")
    assert _json(command(*words, tmp_path / "plain.txt", "--json"))["results"][0]["prompt"] == "what is red"


def test_gsm8k_questions_are_user_turns_of_a_chat_template(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "what is red", "answer": "#### 2"}\n')
    words = ("evaluate", "--model", model, "--data", tmp_path / "rows.jsonl", "--task", "gsm8k", "--max-new-tokens", 2)
    report = _json(command(*words, "--template", "model", "--output", tmp_path / "answers.jsonl", "--json"))
    assert report["questions"] == 1
    asked = command("generate", "--model", model, "--prompt", "what is red", "--template", "model",
                    "--max-new-tokens", 2, "--temperature", 0, "--json")  # fmt: skip
    line = json.loads((tmp_path / "answers.jsonl").read_text().splitlines()[-1])
    assert line["completion"] == _json(asked)["results"][0]["completion"]
