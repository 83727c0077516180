"""Random conversations, and what they are encoded to."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from llamatune.command_options.preparation import PrepareOptions
from llamatune.data.chat_segments import ChatEncoder
from llamatune.data.chat_template import ChatTemplate
from llamatune.data.encoding import Recipe
from llamatune.data.row_formats import FORMATS, row_of
from llamatune.tokenizers.tokenizer import Tokenizer

PARTS = [
    "llama", "stone ", " seven", "walks over", "\n", "\n\n", "  ", "é", "\U0001f999", "日本", "7", ":", "(x)", "'s",
    ".", "e\u0301", "각", "\t", "{{ x }}", "{% raw %}", "#", "[INST]", "ﬁ", "▁",
]  # fmt: skip


def random_text(chance: random.Random, parts: list[str] = PARTS) -> str:
    while True:
        text = "".join(chance.choices(parts, k=chance.randint(1, 9)))
        if text.strip():
            return text


def conversation(chance: random.Random, text: Callable[[random.Random], str] = random_text) -> list[dict[str, Any]]:
    said = [("system", text(chance))] * chance.randint(0, 1)
    for _ in range(chance.randint(1, 4)):
        said += [("user", text(chance)), ("assistant", text(chance))]
    return [{"role": role, "content": content} for role, content in said]


def encoded(
    template: ChatTemplate, tokenizer: Tokenizer, messages: list[dict[str, Any]], *, last_only: bool = False
) -> tuple[list[int], list[int]]:
    """Ids and mask of a conversation."""
    row = row_of({"messages": messages}, FORMATS["chat"])
    made = ChatEncoder(template, tokenizer).row(row, row.completion, last_only=last_only)
    ids, targets = made.segments.encode(tokenizer)
    return ids, [int(any(first <= n < last for first, last in targets)) for n in range(len(ids))]


def recipe(tokenizer: Tokenizer, template: ChatTemplate, **options: Any) -> Recipe:
    made = PrepareOptions(rows=[tokenizer.path], tokenizer=tokenizer.path, output=tokenizer.path.parent, **options)
    return Recipe(tokenizer, template, "chat", made)
