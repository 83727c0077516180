"""mlx-lm on the CPU. An adapter is one in its own layout."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from protocol import answer_all, asks_for_a_reply


def answer(question: dict[str, Any]) -> dict[str, Any]:
    if question["texts"] or question["adapter"]:
        model, tokenizer = mlx_lm.load(question["model"], adapter_path=question["adapter"])
        ends = tokenizer.eos_token_ids
    else:
        model, config = load_model(Path(question["model"]))
        ends = [config["eos_token_id"]]
    model.set_dtype(mx.float32)
    greedy = []
    for ids in question["ids"]:
        made = []
        for token, _ in generate_step(mx.array(ids), model, max_tokens=question["new_tokens"]):
            made.append(int(token))
            if made[-1] in ends:
                break
        greedy.append(made)
    return {
        "release": version("mlx-lm"),
        "theta": model.args.rope_theta,
        "logits": [np.array(model(mx.array([ids]))[0]) for ids in question["ids"]],
        "greedy": greedy,
        "texts": [tokenizer.encode(text, split_special_tokens=True) for text in question["texts"]],
        "chats": [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks_for_a_reply(chat))
            for chat in question["chats"]
        ],
    }


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    answer_all(answer)
