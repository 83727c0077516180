"""Chats in the own templates of real models, against transformers: `make test-interop`; skipped where they lack."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from environments import CACHE
from transformers import PreTrainedTokenizerFast

from llamatune.data.chat_segments import ChatEncoder
from llamatune.data.row_formats import FORMATS, row_of
from llamatune.data.template_choice import load_template
from llamatune.tokenizers.loading import load_tokenizer

pytestmark = pytest.mark.interop
PARTS = [
    "llama", "stone ", " seven", "\n", "\n\n", "  ", "é", "🦙", "日本", "7", ":", "'s", ".", "각", "\t", "{{ x }}",
    "<tool>", "def f(x):\n    return x", "1234567", "?",
]  # fmt: skip
TARGETS = {"llama3.1": "<|eot_id|>", "qwen3": "<|im_end|>", "smollm2-135m-instruct": "<|im_end|>"}


def cached(name: str) -> Path:
    if not (CACHE / name).is_dir():
        pytest.skip(f"no {name} in {CACHE}: run `make test-interop` where it can be fetched")
    return CACHE / name


def said_text(chance: random.Random) -> str:
    return "".join(chance.choices(PARTS, k=chance.randint(1, 9))).strip() or "x"


@pytest.mark.parametrize("name", TARGETS)
def test_a_real_models_own_template(name: str) -> None:
    path, chance = cached(name), random.Random(6)
    tokenizer, judge = load_tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
    encoder = ChatEncoder(load_template("model", tokenizer), tokenizer)
    end = tokenizer.special_ids[TARGETS[name]]
    assert encoder.stop_id == end
    for _ in range(150):
        said = [("system", said_text(chance))] * chance.randint(0, 1)
        for _ in range(chance.randint(1, 4)):
            said += [("user", said_text(chance)), ("assistant", said_text(chance))]
        messages = [{"role": role, "content": text} for role, text in said]
        row = row_of({"messages": messages}, FORMATS["chat"])
        made = encoder.row(row, row.completion, last_only=False)
        ids, targets = made.segments.encode(tokenizer)
        assert ids == judge.apply_chat_template(messages, return_dict=True)["input_ids"]
        answers = [text for role, text in said if role == "assistant"]
        assert made.only_last == (name == "qwen3" and len(answers) > 1)
        assert len(targets) == (1 if made.only_last else len(answers))
        for (first, last), answer in zip(targets, answers[-len(targets) :], strict=True):
            assert ids[last - 1] == end
            text = tokenizer.decode(ids[first : last - 1])
            assert text.removeprefix("<think>\n\n</think>\n\n") == answer
        prompt = encoder.prompt(messages[:-1])
        given = judge.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert prompt.encode(tokenizer)[0] == given
