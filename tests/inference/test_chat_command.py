"""``llamatune chat`` over a pipe and on a terminal, and that its prompts are those of trained rows."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared_rows import read_split
from trained_tokenizers import SMOLLM_CHAT

from llamatune.command_options.chat import ChatOptions
from llamatune.command_options.inference import Sampling
from llamatune.commands import chat as chat_command
from llamatune.errors import SpecError
from llamatune.inference.chat import Answer, Chat, open_chat

Command = Callable[..., Any]
GREEDY = ("--temperature", 0, "--max-new-tokens", 6)
SAID = ["what is red", "and blue", "nine apples over\ngreen hills"]


@pytest.fixture(scope="module")
def model(tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaMA with a chat template of its own."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_base(), directory)
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 100, "<|im_end|>": 101}))
    config = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": SMOLLM_CHAT}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def adapter(model: Path, peft_adapter: Callable[..., Path]) -> Path:
    return peft_adapter(model)


def _talk(command: Command, *words: object, lines: str, code: int = 0) -> list[dict[str, Any]]:
    outcome = command("chat", *words, "--json", stdin=lines)
    assert outcome.code == code, outcome.stderr
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def _whole(chat: Chat, message: str, sampling: Sampling = Sampling(6, 0)) -> tuple[list[str], Answer]:
    *pieces, answer = chat.answer(message, sampling)
    assert isinstance(answer, Answer)
    return [str(piece) for piece in pieces], answer


def test_every_prompt_is_what_training_encodes_of_the_saved_row(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    from llamatune.inference import chat as core

    class Watched(core.Engine):
        def add(self, prompt: Any, draw: int = 0) -> int:
            asked.append(list(prompt))
            return super().add(prompt, draw)

    monkeypatch.setattr(core, "Engine", Watched)
    first, second, third = SAID
    lines = f'{first}\n{second}\n"""\n{third}\n"""\n/save {tmp_path}/rows.jsonl\n/save {tmp_path}/rows.json\n'
    answers = _talk(command, "--model", model, *GREEDY, "--system", "be <|im_end|> kind", lines=lines)
    assert [answer["message"] for answer in answers] == SAID
    assert all(answer["kept"] for answer in answers)
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "rows.json").read_text()) == [row]
    said = [text for answer in answers for text in (answer["message"], answer["completion"])]
    assert [message["content"] for message in row["messages"]] == ["be <|im_end|> kind", *said]
    for name in ("rows.jsonl", "rows.json"):
        words = ("prepare-data", tmp_path / name, "--tokenizer", model, "--output", tmp_path / f"{name}-data")
        assert command(*words, "--template", "model", "--max-seq-length", 512).code == 0
    ((ids, targets),) = read_split(tmp_path / "rows.jsonl-data", "train")
